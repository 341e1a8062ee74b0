"""Attention as its kernels do it: keys appended without a copy of the queries, queries rotated where they are read, and
for decode steps the context cut into splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmc.ir.op import Array, Cost, Emitter, Op, Value
from llmc.ir.ops.attention import PagedAttention, with_scales
from llmc.ir.ops.cache import QkvAppend, RopeAppend, scale_bytes, state_count
from llmc.ir.types import DType, TensorType


@dataclass(frozen=True)
class _Heads(Op, abstract=True):
    """Heads of a joint row qkv [tokens, row_width] (see `QkvAppend`), of whose queries and keys the first `rotary_dim`
    elements are rotated (attributes as in `Rope`; 0: none are). `scaled`: the states are codes, and their scales follow
    (see `KvAppend`). `value_dim`: the width of a value, where it is not `head_dim`.

    Operands begin with qkv and, where there is a rotation, cos and sin [tokens, rotary_dim / 2].
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    layout: str
    scaled: bool
    value_dim: int = field(default=0, kw_only=True)

    stage = "step"

    @property
    def heads(self) -> dict[str, Any]:
        """The attributes that ops of `llmc.ir` have too."""
        names = ("num_heads", "num_kv_heads", "head_dim", "scaled", "value_dim")
        return {name: getattr(self, name) for name in names}

    @property
    def value_width(self) -> int:
        """Elements of a value."""
        return self.value_dim or self.head_dim

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
        heads = TensorType(qkv.dtype, qkv.shape[:1]).elements * self.num_kv_heads
        both = heads * (self.head_dim + self.value_width)
        read = both * qkv.dtype.itemsize + sum(t.bytes for t in types[1 : self.leading + 1])
        written = both * key.dtype.itemsize + scale_bytes(heads, scales)
        return Cost(3 * heads * self.rotary_dim, read, written)


@dataclass(frozen=True)
class _Scored(_Heads, abstract=True):
    """Attention over a joint row. `scale`, `window`, `soft_cap` and `alibi` as in `llmc.ir.ops.attention`; slopes
    f32 [num_heads] are the last operand but for sinks."""

    scale: float
    split: int
    window: int = field(default=0, kw_only=True)
    soft_cap: float = field(default=0.0, kw_only=True)
    alibi: bool = field(default=False, kw_only=True)

    @property
    def of_scores(self) -> dict[str, Any]:
        """The attributes that say what scores are."""
        return {name: getattr(self, name) for name in ("scale", "window", "soft_cap", "alibi")}


@dataclass(frozen=True)
class RotatedAttention(_Scored):
    """`paged_attention` that reads its queries out of the joint row and rotates them. Operands: qkv, [cos, sin], the
    states, positions, query_start, block_tables, [slopes], [sinks]; result [tokens, num_heads · value_width].

    `split` says how many keys are folded before their results are: the order of a sum, no matter of meaning.
    """

    sinks: bool = field(default=False, kw_only=True)

    def decompose(self, b: Emitter, *values: Value) -> Value:
        q = self.queries(b, *values[: self.leading])
        paged = PagedAttention(**self.heads, **self.of_scores, sinks=self.sinks)
        return b.one(paged, q, *values[self.leading :])

    def cost(self, *types: TensorType) -> Cost:
        return _attention_cost(self, self.sinks, types[: self.leading], types[self.leading :])


@dataclass(frozen=True)
class SplitAttention(_Scored):
    """`append_keys` and, for one token of each sequence, attention over every `split` keys of its context apart.

    Operands: qkv, [cos, sin], slot_mapping, the states, positions i32 [tokens], block_tables i32 [tokens, max_blocks],
    [slopes]; results: partial (see `PartialAttention`), the new states.
    """

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
        partial = PartialAttention(**self.heads, **self.of_scores, split=self.split, splits=self.splits)
        return b.one(partial, q, *states, *values[n:]), *states

    def cost(self, *types: TensorType) -> Cost:
        n, first = self.leading + 1 + self.states, self.leading + 1
        append = AppendKeys(**self.heads, **self.rotation).cost(*types[:n])
        positions, tables, *slopes = types[n:]
        query_start = TensorType(DType.I32, (tables.shape[0] + 1,))  # which this op has no use for
        given = (*types[first:n], positions, query_start, tables, *slopes)
        return append + _attention_cost(self, False, types[: self.leading], given) + Cost(0, -query_start.bytes, 0)


@dataclass(frozen=True)
class PartialAttention(Op):
    """Attention of one token of each sequence over every `split` keys of its context apart.

    Operands: q [tokens, num_heads · head_dim], the states, positions i32 [tokens], block_tables i32 [tokens,
    max_blocks], [slopes f32 [num_heads]] (all as in `PagedAttention`). Result f32 [tokens, splits, num_heads ·
    (value_width + 2)]: for each split the sums of values weighted with e^(score - maximum) [num_heads, value_width],
    the maxima [num_heads] and the sums of the weights [num_heads]. Splits in which a token sees no keys mean nothing.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaled: bool
    value_dim: int
    scale: float
    window: int
    soft_cap: float
    alibi: bool
    split: int
    splits: int

    stage = "step"

    @property
    def value_width(self) -> int:
        """Elements of a value."""
        return self.value_dim or self.head_dim

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        count = 3 + state_count(self.scaled) + self.alibi
        operands = "q, the states, positions, block_tables" + ", slopes" * self.alibi
        self.expects(len(types) == count and types[0].rank == 2, operands, *types)
        q, *_, positions, tables = types[: count - self.alibi]
        self.expects(q.shape[1] == self.num_heads * self.head_dim, "q [tokens, num_heads * head_dim]", *types)
        self.expects(positions == TensorType(DType.I32, (q.shape[0],)), "positions i32[tokens]", positions)
        self.expects(tables.shape[:1] == q.shape[:1], "block_tables of one sequence for each token", tables)
        return (TensorType(q.dtype, (q.shape[0], self.splits, self.num_heads * (self.value_width + 2))),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        slopes = arrays[-1] if self.alibi else np.zeros(self.num_heads)
        q, *states, positions, tables = arrays[: len(arrays) - self.alibi]
        key, value = with_scales(states)
        partial = np.zeros((len(q), self.splits, self.num_heads * (self.value_width + 2)))
        group = self.num_heads // self.num_kv_heads
        for token, position in enumerate(positions):
            stop = int(position) + 1
            first = max(0, stop - self.window) if self.window else 0
            heads = q[token].reshape(self.num_kv_heads, group, self.head_dim)
            for split in range(first // self.split, -(-stop // self.split)):
                places = np.arange(max(first, split * self.split), min(stop, (split + 1) * self.split))
                block, offset = tables[token, places // key.shape[3]], places % key.shape[3]
                keys, values = key[block, :, :, offset], value[block, :, offset]
                scores = np.einsum("hgd,khd->hgk", heads, keys) * self.scale
                if self.soft_cap:
                    scores = self.soft_cap * np.tanh(scores / self.soft_cap)
                scores += slopes.reshape(self.num_kv_heads, group, 1) * (places - position)
                peak = scores.max(-1, keepdims=True)
                weights = np.exp(scores - peak)
                mixed = np.einsum("hgk,khd->hgd", weights, values)
                partial[token, split] = np.concatenate([mixed.ravel(), peak.ravel(), weights.sum(-1).ravel()])
        return (partial,)


@dataclass(frozen=True)
class CombineSplits(Op):
    """Attention from its splits. Operands: partial [tokens, splits, num_heads · (value_width + 2)] (see
    `PartialAttention`), positions i32 [tokens], [sinks f32 [num_heads]]; result [tokens, num_heads · value_width]."""

    num_heads: int
    value_width: int
    split: int
    window: int = 0
    sinks: bool = False

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        operands = "partial and positions" + ", sinks" * self.sinks
        self.expects(len(types) == 2 + self.sinks and types[0].rank == 3, operands, *types)
        partial, positions = types[:2]
        width = self.num_heads * (self.value_width + 2)
        self.expects(partial.shape[2] == width, f"partial [tokens, splits, {width}]", *types)
        self.expects(positions == TensorType(DType.I32, partial.shape[:1]), "positions i32[tokens]", positions)
        return (TensorType(partial.dtype, (partial.shape[0], self.num_heads * self.value_width)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        partial, positions = arrays[:2]
        sinks = arrays[2] if self.sinks else np.full(self.num_heads, -np.inf)
        width = self.num_heads * self.value_width
        out = np.empty((len(partial), width))
        for token, position in enumerate(positions):
            first = max(0, int(position) - self.window + 1) if self.window else 0
            rows = partial[token, first // self.split : int(position) // self.split + 1]
            peak, total = rows[:, width : width + self.num_heads], rows[:, width + self.num_heads :]
            highest = np.maximum(peak.max(0), sinks)
            factors = np.exp(peak - highest)
            mixed = rows[:, :width].reshape(-1, self.num_heads, self.value_width) * factors[:, :, None]
            whole = (total * factors).sum(0) + np.exp(sinks - highest)
            out[token] = (mixed.sum(0) / whole[:, None]).ravel()
        return (out,)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return 3 * results[0].elements

    def cost(self, *types: TensorType) -> Cost:
        """Of one split: most have no keys, and are not read."""
        (result,) = self.infer(*types)
        one = TensorType(types[0].dtype, (types[0].shape[0], types[0].shape[2]))
        return Cost(self.operations(types, (result,)), one.bytes + sum(t.bytes for t in types[1:]), result.bytes)


def _attention_cost(op: _Scored, sinks: bool, leading: Sequence[TensorType], rest: Sequence[TensorType]) -> Cost:
    """Of `paged_attention` with queries in a joint row, rotated on the way."""
    q = TensorType(leading[0].dtype, (leading[0].shape[0], op.num_heads * op.head_dim))
    plain = PagedAttention(**op.heads, **op.of_scores, sinks=sinks).cost(q, *rest)
    tables = sum(t.bytes for t in leading[1:])
    return plain + Cost(3 * q.elements * op.rotary_dim // op.head_dim, tables, 0)
