"""Ops of this backend for a mixture of experts: rows grouped by expert, products of these segments, their sum.

A token has `per_token` places, for its chosen experts (those whose weights are not zero) in their order; in all that
is `rows` = tokens · per_token. starts i32 [experts + 1] says where each expert's rows begin; rows from starts[experts]
on are nobody's, and zero in the oracle. See `kernels.experts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.backends.tvm.packing import HALF, PANEL
from llmc.ir.op import Array, Emitter, Op, Value
from llmc.ir.ops.experts import gated
from llmc.ir.quant import FORMATS
from llmc.ir.types import DType, TensorType


class _Grouping(Op, abstract=True):
    """Rows by expert. The last operand is weights f32 [tokens, experts]; the last results are starts, places i32
    [tokens, per_token] (a row, or -1), shares f32 [tokens, per_token] (its weight)."""

    per_token: int

    stage = "step"

    def grouped_types(self, weights: TensorType) -> tuple[TensorType, ...]:
        self.expects(weights.rank == 2 and weights.dtype is DType.F32, "weights f32 [tokens, experts]", weights)
        tokens, experts = weights.shape
        assert isinstance(experts, int)
        self.expects(1 <= self.per_token <= experts, f"per_token from 1 to {experts}", self.per_token)
        places = (tokens, self.per_token)
        starts = TensorType(DType.I32, (experts + 1,))
        return starts, TensorType(DType.I32, places), TensorType(DType.F32, places)

    def grouped(self, weights: Array) -> tuple[Array, Array, Array, Array]:
        """Each row's token, starts, places, shares."""
        tokens, experts = weights.shape
        places = np.full((tokens, self.per_token), -1, np.int64)
        shares = np.zeros((tokens, self.per_token))
        used = np.zeros(tokens, np.int64)
        rows: list[int] = []
        starts = [0]
        for expert in range(experts):
            for token in np.flatnonzero((weights[:, expert] != 0) & (used < self.per_token)):
                places[token, used[token]], shares[token, used[token]] = len(rows), weights[token, expert]
                used[token] += 1
                rows.append(int(token))
            starts.append(len(rows))
        return np.array(rows, np.int64), np.array(starts, np.int64), places, shares


@dataclass(frozen=True)
class GroupRows(_Grouping):
    """x f32 [tokens, width], weights -> rows f32 [tokens · per_token, width], starts, places, shares."""

    per_token: int

    result_count = 4

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 2 and types[0].rank == 2, "x [tokens, width] and weights", *types)
        x, weights = types
        rows = TensorType(x.dtype, (x.shape[0] * self.per_token, x.shape[1]))
        return rows, *self.grouped_types(weights)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        x, weights = arrays
        tokens, *rest = self.grouped(weights)
        rows = np.zeros((len(x) * self.per_token, x.shape[1]))
        rows[: len(tokens)] = x[tokens]
        return rows, *rest


@dataclass(frozen=True)
class GroupTiles(_Grouping):
    """codes i8 [groups, tokens, 32], scales and offsets [groups, tokens] (`QuantizeTiles`), weights -> these three of
    tokens · per_token rows, starts, places, shares."""

    per_token: int

    result_count = 6

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 4 and types[0].rank == 3, "codes, scales, offsets and weights", *types)
        *tiles, weights = types
        rows = [TensorType(t.dtype, (t.shape[0], t.shape[1] * self.per_token, *t.shape[2:])) for t in tiles]
        return *rows, *self.grouped_types(weights)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        *tiles, weights = arrays
        tokens, *rest = self.grouped(weights)
        made = []
        for tile in tiles:
            rows = np.zeros((tile.shape[0], tile.shape[1] * self.per_token, *tile.shape[2:]), tile.dtype)
            rows[:, : len(tokens)] = tile[:, tokens]
            made.append(rows)
        return *made, *rest


@dataclass(frozen=True)
class SegmentLinear(Op):
    """Rows starts[e] to starts[e + 1] of x times weight e, plus its bias. Operands: x f32 [rows, k], starts i32
    [experts + 1], weight [experts, n, k], bias [experts, n] if `bias`; result f32 [rows, n], zero for other rows."""

    bias: bool = False

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 3 + self.bias, "x, starts, weight and bias", *types)
        x, starts, weight, *bias = types
        self.expects(
            x.rank == 2 and weight.rank == 3 and x.shape[1] == weight.shape[2],
            "x [rows, k], weight [experts, n, k]",
            *types,
        )
        experts, n, _ = weight.concrete({})
        self.expects(starts == TensorType(DType.I32, (experts + 1,)), f"starts i32[{experts + 1}]", starts)
        self.expects(all(b.shape == (experts, n) for b in bias), f"bias [{experts}, {n}]", *bias)
        return (TensorType(x.dtype, (x.shape[0], n)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        x, starts, weight, *bias = arrays
        y = np.zeros((len(x), weight.shape[1]))
        for e, matrix in enumerate(weight):
            here = slice(starts[e], starts[e + 1])
            y[here] = x[here] @ matrix.T + (bias[0][e] if bias else 0)
        return (y,)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        depth = operands[0].shape[1]
        assert isinstance(depth, int)
        return results[0].elements * (2 * depth + self.bias)


class _ExpertProduct(Op, abstract=True):
    """A product of segments with packed weights; reads those of as many experts as there are rows at most."""

    stage = "step"

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        at = next(i for i, t in enumerate(operands) if t.dtype is DType.I32 and t.rank == 1)
        rows, experts = operands[0].shape[1 if operands[0].rank == 3 else 0], operands[at].elements - 1
        assert isinstance(rows, int)
        parameters = sum(t.bytes for t in operands[at + 1 :])
        return sum(t.bytes for t in operands[: at + 1]) + parameters * min(rows, experts) // experts


@dataclass(frozen=True)
class PackedExpertsLinear(_ExpertProduct):
    """`segment_linear` with weights in panels. Operands: x f32 [rows, k], starts, panels [experts, panels, k, 16], bias
    f32 [experts, n] if `bias`; result f32 [rows, n], where `n` is `rows` of each weight."""

    rows: int
    bias: bool = False

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, starts, panels, *bias = values
        result: Value = b.segment_linear(x, starts, b.unpack_panels(panels, rows=self.rows), *bias, bias=self.bias)
        return result


@dataclass(frozen=True)
class PackedExpertsGatedLinear(_ExpertProduct):
    """The same with gated panels and the gating of `ir.ops.experts`; bias f32 [experts, panels, 1, 16] packed alike."""

    rows: int
    activation: str
    gating: str = "product"
    bias: bool = False
    limit: float = 0.0

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, starts, panels, *bias = values
        both = b.unpack_gated(panels, rows=self.rows)
        return _gate(b, self, x, starts, both, bias)


class _TiledExpertProduct(_ExpertProduct, abstract=True):
    format: str
    rows: int
    width: int

    def weight(self, b: Emitter, panels: Value, scales: Value, rows: int) -> Value:
        """f32 [experts, rows, width] as panels of codes and scales say."""
        experts = panels.type.shape[0]
        assert isinstance(experts, int)
        codes = b.unpack_codes(panels, bits=FORMATS[self.format].bits, rows=rows)
        unpacked = b.unpack_panels(scales, rows=rows)
        flat = [b.reshape(v, shape=(experts * rows, v.type.shape[2])) for v in (codes, unpacked)]
        whole = b.dequantize_weight(*flat, format=self.format, width=self.width)
        result: Value = b.reshape(whole, shape=(experts, rows, self.width))
        return result


@dataclass(frozen=True)
class TiledExpertsLinear(_TiledExpertProduct):
    """`segment_linear` of tiles. Operands: codes, scales, offsets (`GroupTiles`), starts, weight codes and scales in
    panels [experts, ...], bias f32 [experts, n] if `bias`; result f32 [rows, n]."""

    format: str
    rows: int
    width: int
    per_token: int
    bias: bool = False

    def decompose(self, b: Emitter, *values: Value) -> Value:
        codes, scales, _, starts, panels, panel_scales, *bias = values
        x = b.untile_rows(codes, scales, width=self.width)
        weight = self.weight(b, panels, panel_scales, self.rows)
        result: Value = b.segment_linear(x, starts, weight, *bias, bias=self.bias)
        return result


@dataclass(frozen=True)
class TiledExpertsGatedLinear(_TiledExpertProduct):
    """The same with gated panels and the gating of `ir.ops.experts`, its result quantized: codes, scales, offsets. Bias
    f32 [experts, panels, 1, 16] packed as gated panels."""

    format: str
    rows: int
    width: int
    per_token: int
    activation: str
    gating: str = "product"
    bias: bool = False
    limit: float = 0.0

    result_count = 3

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        codes, scales, _, starts, panels, panel_scales, *bias = values
        x = b.untile_rows(codes, scales, width=self.width)
        joint = self.weight(b, panels, panel_scales, -(-self.rows // HALF) * PANEL)
        both = b.separate_gated(joint, rows=self.rows)
        made: tuple[Value, ...] = b.quantize_tiles(_gate(b, self, x, starts, both, bias))
        return made


@dataclass(frozen=True)
class CombineExperts(Op):
    """The sum of a token's rows times their shares. Operands: rows f32 [tokens · per_token, width], places i32 and
    shares f32 [tokens, per_token]; result f32 [tokens, width]."""

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 3 and all(t.rank == 2 for t in types), "rows, places and shares", *types)
        rows, places, shares = types
        tokens, per_token = places.shape
        self.expects(isinstance(per_token, int), "a known number of places", places)
        assert isinstance(per_token, int)
        self.expects(places.shape == shares.shape and places.dtype is DType.I32, "places i32 and shares alike", *types)
        self.expects(rows.shape[0] == tokens * per_token, f"rows [{tokens} * {per_token}, width]", *types)
        return (TensorType(rows.dtype, (tokens, rows.shape[1])),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        rows, places, shares = arrays
        y = np.zeros((len(places), rows.shape[1]))
        for token, place in np.argwhere(places >= 0):
            y[token] += shares[token, place] * rows[places[token, place]]
        return (y,)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return 2 * operands[0].elements


def _gate(
    b: Emitter,
    op: PackedExpertsGatedLinear | TiledExpertsGatedLinear,
    x: Value,
    starts: Value,
    weight: Value,
    bias: Sequence[Value],
) -> Value:
    """x times gate and up [experts, 2 · rows, k] of its experts, gated; a bias is packed as gated panels."""
    flat = []
    if bias:
        unpacked = b.unpack_gated(bias[0], rows=op.rows)
        flat = [b.reshape(unpacked, shape=unpacked.type.shape[:2])]
    both = b.segment_linear(x, starts, weight, *flat, bias=op.bias)
    return gated(b, both, op.activation, op.gating, op.limit)
