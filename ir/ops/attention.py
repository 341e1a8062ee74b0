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
    block_tables i32 [sequences, max_blocks]; sinks f32 [num_heads] if `sinks`. Result like q.

    `scaled`: the states are codes, and their scales follow (see `KvAppend`). `window`: a token sees only the last so
    many positions, itself included; 0 is no limit, and blocks before it may hold anything. `soft_cap`: scores become
    soft_cap · tanh(score / soft_cap), so that none is larger; 0 leaves them. `sinks`: a logit for each head takes part
    in the softmax and has no value: weights sum to less than 1.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    scaled: bool = False
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(self.window >= 0, "a window of at least 1, or 0 for none", self.window)
        self.expects(0 <= self.soft_cap < math.inf, "a soft_cap above 0, or 0 for none", self.soft_cap)
        operands = "q, the states, positions, query_start, block_tables" + ", sinks" * self.sinks
        count = 4 + state_count(self.scaled) + self.sinks
        self.expects(len(types) == count and types[0].rank == 2, operands, *types)
        given, sinks = types[: count - self.sinks], types[count - self.sinks :]
        expected = TensorType(DType.F32, (self.num_heads,))
        self.expects(all(t == expected for t in sinks), f"sinks {expected}", *sinks)
        q, key, value, *scales, positions, query_start, tables = given
        expects_scales(self, self.scaled, key, scales)
        self.expects(q.shape[1] == self.num_heads * self.head_dim, "q [tokens, num_heads * head_dim]", *types)
        self.expects(key.rank == value.rank == 4, "states of rank 4", *types)
        blocks, heads, width, size = key.shape
        self.expects((heads, width) == (self.num_kv_heads, self.head_dim), "key state of these heads", key)
        self.expects(value.shape == (blocks, heads, size, width), "value state transposed inside a block", value)
        self.expects(positions == TensorType(DType.I32, (q.shape[0],)), "positions i32[tokens]", positions)
        self.expects(query_start.rank == 1, "query_start [sequences + 1]", query_start)
        self.expects(query_start.shape == (tables.shape[0] + 1,), "block_tables [sequences, max_blocks]", tables)
        return (q,)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        given = arrays[:-1] if self.sinks else arrays
        q, *states, positions, query_start, tables = given
        key, value = with_scales(states)
        out = np.empty_like(q)
        size, group = key.shape[3], self.num_heads // self.num_kv_heads
        sinks = arrays[-1] if self.sinks else np.full(self.num_heads, -np.inf)
        sinks = sinks.reshape(self.num_kv_heads, group, 1)
        for sequence in range(len(query_start) - 1):
            for token in range(query_start[sequence], query_start[sequence + 1]):
                stop = int(positions[token]) + 1
                start = max(0, stop - self.window) if self.window else 0
                first = start // size
                blocks = tables[sequence, first : -(-stop // size)]
                seen = slice(start - first * size, stop - first * size)
                keys = key[blocks].transpose(1, 2, 0, 3).reshape(self.num_kv_heads, self.head_dim, -1)[:, :, seen]
                values = value[blocks].transpose(1, 0, 2, 3).reshape(self.num_kv_heads, -1, self.head_dim)[:, seen]
                heads = q[token].reshape(self.num_kv_heads, group, self.head_dim)
                scores = heads @ keys * self.scale
                if self.soft_cap:
                    scores = self.soft_cap * np.tanh(scores / self.soft_cap)
                largest = np.maximum(scores.max(-1, keepdims=True), sinks)
                weights = np.exp(scores - largest)
                total = weights.sum(-1, keepdims=True) + np.exp(sinks - largest)
                out[token] = (weights / total @ values).reshape(-1)
        return (out,)

    def cost(self, *types: TensorType) -> Cost:
        """Every sequence is counted at the full length of its block table, which each of its kv heads reads once; with
        a window, at what its tokens see of that: window - 1 positions and its own tokens."""
        states = types[1 : 1 + state_count(self.scaled)]
        q, tables, size = types[0], types[3 + len(states)], self._block_size(types)
        positions = tables.elements * size
        if self.window:
            sequences = TensorType(DType.I8, tables.shape[:1]).elements
            tokens = TensorType(DType.I8, q.shape[:1]).elements
            positions = min(positions, sequences * (self.window - 1) + tokens)
        slots = max(TensorType(DType.I8, states[0].shape[:1]).elements, 1) * size
        read = q.bytes + sum(t.bytes for t in types[1 + len(states) :])
        return Cost(self.operations(types, (q,)), read + positions * sum(s.bytes for s in states) // slots, q.bytes)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        """Two products of two operations a position; a soft cap divides, multiplies and takes a tanh of each score."""
        blocks = operands[3 + state_count(self.scaled)].shape[1]
        assert isinstance(blocks, int)
        context = blocks * self._block_size(operands)
        context = min(context, self.window) if self.window else context
        caps = 3 * results[0].elements // self.head_dim if self.soft_cap else 0
        return (4 * results[0].elements + caps) * context

    def _block_size(self, types: Sequence[TensorType]) -> int:
        size = types[1].shape[3]
        assert isinstance(size, int)
        return size


def with_scales(states: Sequence[Array]) -> tuple[Array, Array]:
    """Keys and values of states, times their scales where there are any."""
    key, value, *scales = states
    if not scales:
        return key, value
    return key * scales[0][:, :, None, :], value * scales[1][:, :, :, None]
