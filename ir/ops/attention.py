"""Attention: over one sequence, and over paged state for a ragged batch of sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmc.ir.op import Array, Cost, Emitter, Op, Value
from llmc.ir.ops.cache import expects_scales, state_count
from llmc.ir.types import DType, TensorType


@dataclass(frozen=True)
class _Scores(Op, abstract=True):
    """What every attention says of its heads and of the scores between a query and a key.

    A score is scale · q·k. `window`: a token sees only the last so many positions, itself included; 0 is no limit.
    `soft_cap`: scores become soft_cap · tanh(score / soft_cap), so that none is larger; 0 leaves them. `alibi`: slope ·
    (key's position - query's) is added, with a slope for each head (Press et al., 2022). `sinks`: a logit for each
    head takes part in the softmax and has no value, so that weights sum to less than 1. `value_dim`: the width of a
    value where it is not a key's.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = field(default=0, kw_only=True)
    soft_cap: float = field(default=0.0, kw_only=True)
    alibi: bool = field(default=False, kw_only=True)
    sinks: bool = field(default=False, kw_only=True)
    value_dim: int = field(default=0, kw_only=True)

    @property
    def value_width(self) -> int:
        """Elements of a value."""
        return self.value_dim or self.head_dim

    @property
    def per_head(self) -> tuple[str, ...]:
        """The operands that come last: f32 [num_heads] each."""
        return ("slopes",) * self.alibi + ("sinks",) * self.sinks

    def expects_scores(self, *types: TensorType) -> None:
        """Raise `TypeMismatch` unless the attributes make sense and the last operands are those they need."""
        self.expects(self.num_heads % self.num_kv_heads == 0, "num_heads a multiple of num_kv_heads")
        self.expects(self.window >= 0, "a window of at least 1, or 0 for none", self.window)
        self.expects(0 <= self.soft_cap < math.inf, "a soft_cap above 0, or 0 for none", self.soft_cap)
        self.expects(self.value_dim >= 0, "a value_dim of at least 1, or 0 for head_dim", self.value_dim)
        expected = TensorType(DType.F32, (self.num_heads,))
        for name, type in zip(self.per_head, types[len(types) - len(self.per_head) :], strict=True):
            self.expects(type == expected, f"{name} {expected}", type)


@dataclass(frozen=True)
class Attention(_Scores):
    """Causal softmax attention of one sequence, grouped heads. Operands: q [t, num_heads · head_dim], k [t,
    num_kv_heads · head_dim], v [t, num_kv_heads · value_width], positions i32 [t], then slopes f32 [num_heads] if
    `alibi` and sinks f32 [num_heads] if `sinks`; result [t, num_heads · value_width]. A token sees those at its
    position or before; the other attributes are those of `_Scores`."""

    stage = "fused"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        count = 4 + len(self.per_head)
        self.expects(
            len(types) == count and types[0].rank == 2, ", ".join(("q, k, v, positions", *self.per_head)), *types
        )
        self.expects_scores(*types)
        q, k, v, positions = types[:4]
        tokens = q.shape[0]
        self.expects(q.shape[1] == self.num_heads * self.head_dim, "q [t, num_heads * head_dim]", *types)
        for name, given, width in (("k", k, self.head_dim), ("v", v, self.value_width)):
            expected = TensorType(q.dtype, (tokens, self.num_kv_heads * width))
            self.expects(given == expected, f"{name} {expected}", *types)
        self.expects(positions == TensorType(DType.I32, (tokens,)), "positions i32[t]", *types)
        return (TensorType(q.dtype, (tokens, self.num_heads * self.value_width)),)

    def decompose(self, b: Emitter, *values: Value) -> Value:
        q, k, v, positions, *rest = values
        per_head = dict(zip(self.per_head, rest, strict=True))
        tokens, group = q.type.shape[0], self.num_heads // self.num_kv_heads

        def heads(x: Value, count: int, width: int) -> Value:
            split = b.reshape(x, shape=(tokens, count, width))
            result: Value = b.transpose(split, axes=(1, 0, 2))
            return result

        def shared(x: Value, width: int) -> Value:
            if group == 1:
                return heads(x, self.num_kv_heads, width)
            single = b.reshape(heads(x, self.num_kv_heads, width), shape=(self.num_kv_heads, 1, tokens, width))
            repeated = b.expand(single, shape=(self.num_kv_heads, group, tokens, width))
            result: Value = b.reshape(repeated, shape=(self.num_heads, tokens, width))
            return result

        def of_heads(name: str) -> Value:
            vector = b.reshape(per_head[name], shape=(self.num_heads, 1, 1))
            result: Value = vector if vector.type.dtype is q.type.dtype else b.cast(vector, dtype=q.type.dtype)
            return result

        keys = b.transpose(shared(k, self.head_dim), axes=(0, 2, 1))
        scores = b.mul_scalar(b.matmul(heads(q, self.num_heads, self.head_dim), keys), value=self.scale)
        if self.soft_cap:
            scores = b.mul_scalar(b.tanh(b.mul_scalar(scores, value=1 / self.soft_cap)), value=self.soft_cap)
        row, column = b.reshape(positions, shape=(tokens, 1)), b.reshape(positions, shape=(1, tokens))
        if self.alibi:
            distance = b.cast(b.sub(column, row), dtype=q.type.dtype)
            scores = b.add(scores, b.mul(of_heads("slopes"), distance))
        visible = b.greater_equal(row, column)
        if self.window:
            near = b.greater_equal(b.add_scalar(column, value=float(self.window - 1)), row)
            visible = b.logical_and(visible, near)
        masked = b.mask(scores, visible, value=-math.inf)
        weights = b.sink_softmax(masked, of_heads("sinks")) if self.sinks else b.softmax(masked)
        mixed = b.transpose(b.matmul(weights, shared(v, self.value_width)), axes=(1, 0, 2))
        result: Value = b.reshape(mixed, shape=(tokens, self.num_heads * self.value_width))
        return result


@dataclass(frozen=True)
class PagedAttention(_Scores):
    """Causal attention of a ragged batch through block tables (Kwon et al., 2023).

    Operands: q [tokens, num_heads · head_dim]; key [blocks, num_kv_heads, head_dim, block_size] and value [blocks,
    num_kv_heads, block_size, value_width] (states that already hold the batch's own tokens); positions i32 [tokens];
    query_start i32 [sequences + 1] (the tokens of sequence s are query_start[s] to query_start[s + 1]);
    block_tables i32 [sequences, max_blocks]; slopes f32 [num_heads] if `alibi`; sinks f32 [num_heads] if `sinks`.
    Result [tokens, num_heads · value_width].

    `scaled`: the states are codes, and their scales follow (see `KvAppend`). Blocks before a `window` may hold
    anything. The other attributes are those of `_Scores`.
    """

    scaled: bool = False

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        operands = ", ".join(("q, the states, positions, query_start, block_tables", *self.per_head))
        count = 4 + state_count(self.scaled) + len(self.per_head)
        self.expects(len(types) == count and types[0].rank == 2, operands, *types)
        self.expects_scores(*types)
        q, key, value, *scales, positions, query_start, tables = types[: count - len(self.per_head)]
        expects_scales(self, self.scaled, key, scales)
        self.expects(q.shape[1] == self.num_heads * self.head_dim, "q [tokens, num_heads * head_dim]", *types)
        self.expects(key.rank == value.rank == 4, "states of rank 4", *types)
        blocks, heads, width, size = key.shape
        self.expects((heads, width) == (self.num_kv_heads, self.head_dim), "key state of these heads", key)
        expected = (blocks, heads, size, self.value_width)
        self.expects(value.shape == expected, "value state transposed inside a block", value)
        self.expects(positions == TensorType(DType.I32, (q.shape[0],)), "positions i32[tokens]", positions)
        self.expects(query_start.rank == 1, "query_start [sequences + 1]", query_start)
        self.expects(query_start.shape == (tables.shape[0] + 1,), "block_tables [sequences, max_blocks]", tables)
        return (TensorType(q.dtype, (q.shape[0], self.num_heads * self.value_width)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        last = len(arrays) - len(self.per_head)
        per_head = dict(zip(self.per_head, arrays[last:], strict=True))
        q, *states, positions, query_start, tables = arrays[:last]
        key, value = with_scales(states)
        out = np.empty((len(q), self.num_heads * self.value_width))
        size, group = key.shape[3], self.num_heads // self.num_kv_heads
        sinks = per_head.get("sinks", np.full(self.num_heads, -np.inf)).reshape(self.num_kv_heads, group, 1)
        slopes = per_head.get("slopes", np.zeros(self.num_heads)).reshape(self.num_kv_heads, group, 1)
        for sequence in range(len(query_start) - 1):
            for token in range(query_start[sequence], query_start[sequence + 1]):
                stop = int(positions[token]) + 1
                start = max(0, stop - self.window) if self.window else 0
                first = start // size
                blocks = tables[sequence, first : -(-stop // size)]
                seen = slice(start - first * size, stop - first * size)
                keys = key[blocks].transpose(1, 2, 0, 3).reshape(self.num_kv_heads, self.head_dim, -1)[:, :, seen]
                values = value[blocks].transpose(1, 0, 2, 3).reshape(self.num_kv_heads, -1, self.value_width)[:, seen]
                heads = q[token].reshape(self.num_kv_heads, group, self.head_dim)
                scores = heads @ keys * self.scale
                if self.soft_cap:
                    scores = self.soft_cap * np.tanh(scores / self.soft_cap)
                scores = scores + slopes * np.arange(start - stop + 1, 1)
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
        (result,) = self.infer(*types)
        read += positions * sum(s.bytes for s in states) // slots
        return Cost(self.operations(types, (result,)), read, result.bytes)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        """Two products of two operations a position; a soft cap divides, multiplies and takes a tanh of each score, a
        slope is multiplied and added."""
        blocks = operands[3 + state_count(self.scaled)].shape[1]
        assert isinstance(blocks, int)
        context = blocks * self._block_size(operands)
        context = min(context, self.window) if self.window else context
        heads = operands[0].elements // self.head_dim
        widths = 2 * (self.head_dim + self.value_width) + 3 * bool(self.soft_cap) + 2 * self.alibi
        return heads * widths * context

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
