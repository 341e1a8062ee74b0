"""Attention: over one sequence, and over paged state for a ragged batch of sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.ir.op import Array, Cost, Emitter, Op, Value
from llmc.ir.ops.cache import expects_scales, state_count
from llmc.ir.types import DType, TensorType


@dataclass(frozen=True)
class Attention(Op):
    """Causal softmax attention of one sequence, grouped heads. Operands: q [t, num_heads · head_dim], k and v
    [t, num_kv_heads · head_dim], positions i32 [t]; result like q. A token sees those at its position or before."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float

    stage = "fused"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(self.num_heads % self.num_kv_heads == 0, "num_heads a multiple of num_kv_heads")
        self.expects(len(types) == 4 and types[0].rank == 2, "q, k, v and positions", *types)
        tokens = types[0].shape[0]
        kv = TensorType(types[0].dtype, (tokens, self.num_kv_heads * self.head_dim))
        self.expects(types[0].shape[1] == self.num_heads * self.head_dim, "q [t, num_heads * head_dim]", *types)
        self.expects(types[1] == types[2] == kv, f"k and v {kv}", *types)
        self.expects(types[3] == TensorType(DType.I32, (tokens,)), "positions i32[t]", *types)
        return types[:1]

    def decompose(self, b: Emitter, *values: Value) -> Value:
        q, k, v, positions = values
        tokens, group = q.type.shape[0], self.num_heads // self.num_kv_heads

        def heads(x: Value, count: int) -> Value:
            split = b.reshape(x, shape=(tokens, count, self.head_dim))
            result: Value = b.transpose(split, axes=(1, 0, 2))
            return result

        def shared(x: Value) -> Value:
            if group == 1:
                return heads(x, self.num_kv_heads)
            single = b.reshape(heads(x, self.num_kv_heads), shape=(self.num_kv_heads, 1, tokens, self.head_dim))
            repeated = b.expand(single, shape=(self.num_kv_heads, group, tokens, self.head_dim))
            result: Value = b.reshape(repeated, shape=(self.num_heads, tokens, self.head_dim))
            return result

        scores = b.matmul(heads(q, self.num_heads), b.transpose(shared(k), axes=(0, 2, 1)))
        row, column = b.reshape(positions, shape=(tokens, 1)), b.reshape(positions, shape=(1, tokens))
        visible = b.greater_equal(row, column)
        weights = b.softmax(b.mask(b.mul_scalar(scores, value=self.scale), visible, value=-math.inf))
        mixed = b.transpose(b.matmul(weights, shared(v)), axes=(1, 0, 2))
        result: Value = b.reshape(mixed, shape=(tokens, self.num_heads * self.head_dim))
        return result


@dataclass(frozen=True)
class PagedAttention(Op):
    """Causal attention of a ragged batch through block tables (Kwon et al., 2023).

    Operands: q [tokens, num_heads · head_dim]; key [blocks, num_kv_heads, head_dim, block_size] and value [blocks,
    num_kv_heads, block_size, head_dim] (states that already hold the batch's own tokens); positions i32 [tokens];
    query_start i32 [sequences + 1] (the tokens of sequence s are query_start[s] to query_start[s + 1]);
    block_tables i32 [sequences, max_blocks]. Result like q. `scaled`: the states are codes, and their scales follow
    (see `KvAppend`).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    scaled: bool = False

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        operands = "q, the states, positions, query_start, block_tables"
        self.expects(len(types) == 4 + state_count(self.scaled) and types[0].rank == 2, operands, *types)
        q, key, value, *scales, positions, query_start, tables = types
        expects_scales(self, self.scaled, key, scales)
        self.expects(q.shape[1] == self.num_heads * self.head_dim, "q [tokens, num_heads * head_dim]", *types)
        self.expects(key.rank == value.rank == 4, "states of rank 4", *types)
        blocks, heads, width, size = key.shape
        self.expects((heads, width) == (self.num_kv_heads, self.head_dim), "key state of these heads", key)
        self.expects(value.shape == (blocks, heads, size, width), "value state transposed inside a block", value)
        self.expects(positions == TensorType(DType.I32, (q.shape[0],)), "positions i32[tokens]", positions)
        self.expects(query_start.rank == 1, "query_start [sequences + 1]", query_start)
        self.expects(query_start.shape == (tables.shape[0] + 1,), "block_tables [sequences, max_blocks]", tables)
        return types[:1]

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        q, *states, positions, query_start, tables = arrays
        key, value = with_scales(states)
        out = np.empty_like(q)
        size, group = key.shape[3], self.num_heads // self.num_kv_heads
        for sequence in range(len(query_start) - 1):
            for token in range(query_start[sequence], query_start[sequence + 1]):
                length = int(positions[token]) + 1
                blocks = tables[sequence, : -(-length // size)]
                keys = key[blocks].transpose(1, 2, 0, 3).reshape(self.num_kv_heads, self.head_dim, -1)[:, :, :length]
                values = value[blocks].transpose(1, 0, 2, 3).reshape(self.num_kv_heads, -1, self.head_dim)[:, :length]
                heads = q[token].reshape(self.num_kv_heads, group, self.head_dim)
                scores = heads @ keys * self.scale
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                out[token] = (weights / weights.sum(-1, keepdims=True) @ values).reshape(-1)
        return (out,)

    def cost(self, *types: TensorType) -> Cost:
        """Every sequence is counted at the full length of its block table, which each of its kv heads reads once."""
        q, *states, positions, query_start, tables = types
        flops = self.operations(types, (q,))
        block = sum(s.bytes for s in states) // max(TensorType(DType.I8, states[0].shape[:1]).elements, 1)
        read = q.bytes + positions.bytes + query_start.bytes + tables.bytes + tables.elements * block
        return Cost(flops, read, q.bytes)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        context = operands[-1].shape[1]
        size = operands[1].shape[3]
        assert isinstance(context, int) and isinstance(size, int)
        return 4 * results[0].elements * context * size


def with_scales(states: Sequence[Array]) -> tuple[Array, Array]:
    """Keys and values of states, times their scales where there are any."""
    key, value, *scales = states
    if not scales:
        return key, value
    return key * scales[0][:, :, None, :], value * scales[1][:, :, :, None]
