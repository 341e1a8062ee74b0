"""Attention as its kernels do it: keys appended without a copy of the queries, queries rotated where they are read, and
for decode steps the context cut into splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.ir.op import Array, Cost, Emitter, Op, Value
from llmc.ir.ops.attention import PagedAttention, with_scales
from llmc.ir.ops.cache import QkvAppend, RopeAppend, scale_bytes, state_count
from llmc.ir.types import DType, TensorType


@dataclass(frozen=True)
class _Heads(Op, abstract=True):
    """Heads of a joint projection qkv [tokens, (num_heads + 2 · num_kv_heads) · head_dim], of whose queries and keys
    the first `rotary_dim` elements are rotated (attributes as in `Rope`; 0: none are). `scaled`: the states are codes,
    and their scales follow (see `KvAppend`).

    Operands begin with qkv and, where there is a rotation, cos and sin [tokens, rotary_dim / 2].
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    layout: str
    scaled: bool

    stage = "step"

    @property
    def heads(self) -> dict[str, Any]:
        """The attributes that ops of `llmc.ir` have too."""
        names = ("num_heads", "num_kv_heads", "head_dim", "scaled")
        return {name: getattr(self, name) for name in names}

    @property
    def rotation(self) -> dict[str, Any]:
        """The attributes that say how heads are rotated."""
        return {"rotary_dim": self.rotary_dim, "layout": self.layout}

    @property
    def leading(self) -> int:
        """How many operands qkv and its tables are."""
        return 3 if self.rotary_dim else 1

    @property
    def states(self) -> int:
        """How many states there are."""
        return state_count(self.scaled)

    def append(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        """Rotated queries and the new states, from qkv, [cos, sin], slot_mapping and the states."""
        op = RopeAppend(**self.heads, **self.rotation) if self.rotary_dim else QkvAppend(**self.heads)
        results: tuple[Value, ...] = b(op, *values)
        return results

    def queries(self, b: Emitter, qkv: Value, *tables: Value) -> Value:
        """Rotated queries [tokens, num_heads · head_dim]."""
        return queries(b, self.num_heads, self.head_dim, self.rotation, qkv, *tables)


def queries(
    b: Emitter, num_heads: int, head_dim: int, rotation: Mapping[str, Any], qkv: Value, *tables: Value
) -> Value:
    """The queries of a joint projection, rotated where there are tables."""
    q: Value = b.slice(qkv, axis=1, start=0, stop=num_heads * head_dim)
    return b.rope(q, *tables, num_heads=num_heads, head_dim=head_dim, **rotation) if tables else q


@dataclass(frozen=True)
class AppendKeys(_Heads):
    """`rope_append`, or `qkv_append` without a rotation, that leaves the queries where they are. Operands: qkv,
    [cos, sin], slot_mapping, the states; results: the new states."""

    @property
    def result_count(self) -> int:  # type: ignore[override]
        """The states."""
        return self.states

    @property
    def updates(self) -> Mapping[int, int]:  # type: ignore[override]
        """See `Op`."""
        return {self.leading + 1 + i: i for i in range(self.states)}

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        return self.append(b, *values)[1:]

    def cost(self, *types: TensorType) -> Cost:
        qkv, (key, _, *scales) = types[0], types[self.leading + 1 :]
        both = 2 * qkv.elements * self.num_kv_heads // (self.num_heads + 2 * self.num_kv_heads)
        read = both * qkv.dtype.itemsize + sum(t.bytes for t in types[1 : self.leading + 1])
        written = both * key.dtype.itemsize + scale_bytes(both // 2 // self.head_dim, scales)
        return Cost(3 * both // 2 * self.rotary_dim // self.head_dim, read, written)


@dataclass(frozen=True)
class RotatedAttention(_Heads):
    """`paged_attention` that reads its queries out of the joint projection and rotates them. Operands: qkv,
    [cos, sin], the states, positions, query_start, block_tables; result [tokens, num_heads · head_dim].

    `split` says how many keys are folded before their results are: the order of a sum, no matter of meaning.
    """

    scale: float
    split: int

    def decompose(self, b: Emitter, *values: Value) -> Value:
        q = self.queries(b, *values[: self.leading])
        result: Value = b.paged_attention(q, *values[self.leading :], **self.heads, scale=self.scale)
        return result

    def cost(self, *types: TensorType) -> Cost:
        return _attention_cost(self, self.scale, types[: self.leading], types[self.leading :])


@dataclass(frozen=True)
class SplitAttention(_Heads):
    """`append_keys` and, for one token of each sequence, attention over every `split` keys of its context apart.

    Operands: qkv, [cos, sin], slot_mapping, the states, positions i32 [tokens], block_tables i32 [tokens, max_blocks];
    results: partial (see `PartialAttention`), the new states.
    """

    scale: float
    split: int
    splits: int

    @property
    def result_count(self) -> int:  # type: ignore[override]
        """Partial results and the states."""
        return 1 + self.states

    @property
    def updates(self) -> Mapping[int, int]:  # type: ignore[override]
        """See `Op`."""
        return {self.leading + i: i for i in range(1, 1 + self.states)}

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        n = self.leading + 1 + self.states
        q, *states = self.append(b, *values[:n])
        partial = PartialAttention(**self.heads, scale=self.scale, split=self.split, splits=self.splits)
        return b.one(partial, q, *states, *values[n:]), *states

    def cost(self, *types: TensorType) -> Cost:
        n, first = self.leading + 1 + self.states, self.leading + 1
        append = AppendKeys(**self.heads, **self.rotation).cost(*types[:n])
        positions, tables = types[n:]
        starts = TensorType(positions.dtype, (tables.shape[0] + 1,))
        return append + _attention_cost(
            self, self.scale, types[: self.leading], (*types[first:n], positions, starts, tables)
        )


@dataclass(frozen=True)
class PartialAttention(Op):
    """Attention of one token of each sequence over every `split` keys of its context apart.

    Operands: q [tokens, num_heads · head_dim], the states, positions i32 [tokens], block_tables i32 [tokens,
    max_blocks] (as in `PagedAttention`). Result f32 [tokens, splits, num_heads · (head_dim + 2)]: for each split the
    sums of values weighted with e^(score - maximum) [num_heads, head_dim], the maxima [num_heads] and the sums of the
    weights [num_heads]. Splits in which a token has no keys mean nothing.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaled: bool
    scale: float
    split: int
    splits: int

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        count = 3 + state_count(self.scaled)
        self.expects(len(types) == count and types[0].rank == 2, "q, the states, positions, block_tables", *types)
        q, *_, positions, tables = types
        self.expects(q.shape[1] == self.num_heads * self.head_dim, "q [tokens, num_heads * head_dim]", *types)
        self.expects(positions == TensorType(DType.I32, (q.shape[0],)), "positions i32[tokens]", positions)
        self.expects(tables.shape[:1] == q.shape[:1], "block_tables of one sequence for each token", tables)
        return (TensorType(q.dtype, (q.shape[0], self.splits, self.num_heads * (self.head_dim + 2))),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        q, *states, positions, tables = arrays
        key, value = with_scales(states)
        partial = np.zeros((len(q), self.splits, self.num_heads * (self.head_dim + 2)))
        group = self.num_heads // self.num_kv_heads
        for token, position in enumerate(positions):
            places = np.arange(int(position) + 1)
            block, offset = tables[token, places // key.shape[3]], places % key.shape[3]
            keys, values = key[block, :, :, offset], value[block, :, offset]
            heads = q[token].reshape(self.num_kv_heads, group, self.head_dim)
            for split, start in enumerate(range(0, len(places), self.split)):
                part = slice(start, start + self.split)
                scores = np.einsum("hgd,khd->hgk", heads, keys[part]) * self.scale
                peak = scores.max(-1, keepdims=True)
                weights = np.exp(scores - peak)
                mixed = np.einsum("hgk,khd->hgd", weights, values[part])
                partial[token, split] = np.concatenate([mixed.ravel(), peak.ravel(), weights.sum(-1).ravel()])
        return (partial,)


@dataclass(frozen=True)
class CombineSplits(Op):
    """Attention from its splits. Operands: partial [tokens, splits, num_heads · (head_dim + 2)] (see
    `PartialAttention`), positions i32 [tokens]; result [tokens, num_heads · head_dim]."""

    num_heads: int
    head_dim: int
    split: int

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 2 and types[0].rank == 3, "partial and positions", *types)
        partial, positions = types
        width = self.num_heads * (self.head_dim + 2)
        self.expects(partial.shape[2] == width, f"partial [tokens, splits, {width}]", *types)
        self.expects(positions == TensorType(DType.I32, partial.shape[:1]), "positions i32[tokens]", positions)
        return (TensorType(partial.dtype, (partial.shape[0], self.num_heads * self.head_dim)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        partial, positions = arrays
        width = self.num_heads * self.head_dim
        out = np.empty((len(partial), width))
        for token, position in enumerate(positions):
            rows = partial[token, : int(position) // self.split + 1]
            peak, total = rows[:, width : width + self.num_heads], rows[:, width + self.num_heads :]
            factors = np.exp(peak - peak.max(0))
            mixed = rows[:, :width].reshape(-1, self.num_heads, self.head_dim) * factors[:, :, None]
            out[token] = (mixed.sum(0) / (total * factors).sum(0)[:, None]).ravel()
        return (out,)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return 3 * results[0].elements

    def cost(self, *types: TensorType) -> Cost:
        """Of one split: most have no keys, and are not read."""
        (result,) = self.infer(*types)
        one = TensorType(types[0].dtype, (types[0].shape[0], types[0].shape[2]))
        return Cost(self.operations(types, (result,)), one.bytes + types[1].bytes, result.bytes)


def _attention_cost(op: _Heads, scale: float, leading: Sequence[TensorType], rest: Sequence[TensorType]) -> Cost:
    """Of `paged_attention` with queries in a joint projection, rotated on the way."""
    q = TensorType(leading[0].dtype, (leading[0].shape[0], op.num_heads * op.head_dim))
    plain = PagedAttention(**op.heads, scale=scale).cost(q, *rest)
    tables = sum(t.bytes for t in leading[1:])
    return plain + Cost(3 * q.elements * op.rotary_dim // op.head_dim, tables, 0)
