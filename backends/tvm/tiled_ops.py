"""Ops of this backend for quantized products: weights' codes in panels, activations in tiles, and what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.backends.tvm.ops import Packing, for_each
from llmc.backends.tvm.packing import HALF, PANEL, interleave, pack_codes, separate, unpack_codes
from llmc.ir.op import Array, Emitter, Op, Value
from llmc.ir.ops.quantized import QuantizeRows
from llmc.ir.quant import FORMATS
from llmc.ir.types import DType, TensorType

GROUP = 32
"""Elements that share a scale, in weights and activations; the kernels know no other."""


@dataclass(frozen=True)
class PackCodes(Packing):
    """codes u8 [n, K] -> u8 [ceil(n / 16), K / 32, bits, 16, 4] (`packing.pack_codes`)."""

    bits: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        experts, (n, k) = self.check_rank(types, 2, "codes u8 [n, K]")
        self.expects(types[0].dtype is DType.U8, "codes u8 [n, K]", *types)
        self.expects(k % GROUP == 0, f"K a multiple of {GROUP}", *types)
        return (TensorType(DType.U8, (*experts, -(-n // PANEL), k // GROUP, self.bits, PANEL, 4)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (for_each(lambda w: pack_codes(w, self.bits), arrays[0].astype(np.uint8), 2),)


@dataclass(frozen=True)
class UnpackCodes(Packing):
    """The inverse of `PackCodes`, to codes u8 [rows, K]."""

    bits: int
    rows: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        experts, (panels, groups, *rest) = self.check_rank(types, 5, "codes in panels")
        self.expects(rest == [self.bits, PANEL, 4], f"words of {self.bits} bits", *types)
        self.expects(panels == -(-self.rows // PANEL), f"panels of {self.rows} rows", *types)
        return (TensorType(DType.U8, (*experts, self.rows, groups * GROUP)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (for_each(lambda w: unpack_codes(w, self.bits, self.rows), arrays[0].astype(np.uint8), 5),)


@dataclass(frozen=True)
class InterleaveGated(Packing):
    """[2n, k], gate rows then up rows -> [16 · ceil(n / 8), k]: 8 rows of gate, their 8 of up, and so on."""

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        experts, (n, k) = self.check_rank(types, 2, "one matrix")
        return (TensorType(types[0].dtype, (*experts, -(-n // 2 // HALF) * PANEL, k)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (for_each(lambda w: interleave(*np.split(w, 2)), arrays[0], 2),)


@dataclass(frozen=True)
class SeparateGated(Packing):
    """The inverse of `InterleaveGated`; `rows` is the number of gate rows."""

    rows: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        experts, (_, k) = self.check_rank(types, 2, "one matrix")
        return (TensorType(types[0].dtype, (*experts, 2 * self.rows, k)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (for_each(lambda w: np.concatenate(separate(w, self.rows)), arrays[0], 2),)


@dataclass(frozen=True)
class QuantizeTiles(Op):
    """`quantize_rows` in the layout of the kernels: x f32 [m, k] -> codes i8 [groups, m, 32], scales f32 [groups, m],
    offsets i32 [groups, m], which are -8 times the sum of a group's codes."""

    stage = "step"
    result_count = 3

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 2 and types[0].dtype.is_float, "x [m, k]", *types)
        rows, width = types[0].shape
        assert isinstance(width, int)
        groups = -(-width // GROUP)
        return (
            TensorType(DType.I8, (groups, rows, GROUP)),
            TensorType(DType.F32, (groups, rows)),
            TensorType(DType.I32, (groups, rows)),
        )

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        codes, scales = QuantizeRows(GROUP).reference(arrays[0])
        tiles = codes.reshape(len(codes), -1, GROUP).transpose(1, 0, 2)
        return tiles, scales.T.astype(np.float64), -8 * tiles.sum(2, dtype=np.int64)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return 3 * operands[0].elements


@dataclass(frozen=True)
class UntileRows(Op):
    """codes and scales of `QuantizeTiles` -> f32 [m, width], dequantized."""

    width: int

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 2 and types[0].rank == 3 and types[1].rank == 2, "codes and scales", *types)
        self.expects(types[0].shape[:2] == types[1].shape, "a scale for each group", *types)
        self.expects(types[0].shape[0] == -(-self.width // GROUP), f"groups of {self.width} elements", *types)
        return (TensorType(DType.F32, (types[0].shape[1], self.width)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        codes, scales = arrays
        values = codes.astype(np.float64) * scales.astype(np.float64)[:, :, None]
        return (values.transpose(1, 0, 2).reshape(codes.shape[1], -1)[:, : self.width],)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return results[0].elements


@dataclass(frozen=True)
class TiledLinear(Op):
    """`quantized_linear` of tiles. Operands: codes, scales, offsets (`QuantizeTiles`), weight codes in panels, weight
    scales f16 in panels, [bias f32 [rows]], [residual f32 [m, rows]]; result f32 [m, rows]."""

    format: str
    rows: int
    width: int
    bias: bool = False
    activation: str = "none"
    residual: bool = False

    stage = "step"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        codes, scales, _, panels, panel_scales, *rest = values
        x = b.untile_rows(codes, scales, width=self.width)
        weight = _weight(b, panels, panel_scales, self.format, self.rows, self.width)
        attributes = {"bias": self.bias, "activation": self.activation, "residual": self.residual}
        result: Value = b.linear(x, weight, *rest, **attributes)
        return result


@dataclass(frozen=True)
class TiledGatedLinear(Op):
    """`quantized_gated_linear` of tiles. Operands: codes, scales, offsets, gated weight codes and scales in panels;
    result f32 [m, rows]."""

    format: str
    rows: int
    width: int
    activation: str

    stage = "step"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        codes, scales, _, panels, panel_scales = values
        x = b.untile_rows(codes, scales, width=self.width)
        rows = -(-self.rows // HALF) * PANEL
        joint = _weight(b, panels, panel_scales, self.format, rows, self.width)
        weight = b.separate_gated(joint, rows=self.rows)
        result: Value = b.gated_linear(x, weight, activation=self.activation)
        return result


@dataclass(frozen=True)
class TiledEmbedding(Op):
    """`quantized_embedding` out of panels. Operands: ids i32 [n], codes and scales in panels; result f32 [n, width]."""

    format: str
    rows: int
    width: int

    stage = "step"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        ids, panels, panel_scales = values
        table = _weight(b, panels, panel_scales, self.format, self.rows, self.width)
        result: Value = b.embedding(ids, table, dtype=DType.F32)
        return result

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        """Only the rows that are asked for."""
        ids, panels, scales = operands
        return ids.bytes + ids.elements * (panels.bytes + scales.bytes) // self.rows


def _weight(b: Emitter, panels: Value, scales: Value, format: str, rows: int, width: int) -> Value:
    """The weight that panels of codes and scales stand for, f32 [rows, width]."""
    codes = b.unpack_codes(panels, bits=FORMATS[format].bits, rows=rows)
    result: Value = b.dequantize_weight(codes, b.unpack_panels(scales, rows=rows), format=format, width=width)
    return result


@dataclass(frozen=True)
class PanelKeys(Op):
    """logits f32 [m, n] -> i64 [m, ceil(n / 16)]: of each 16 columns the largest logit and its column, as one number
    whose order is that of the logits (`kernels.quantized.best_key`)."""

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 2, "logits [m, n]", *types)
        rows, columns = types[0].shape
        assert isinstance(columns, int)
        return (TensorType(DType.I64, (rows, -(-columns // PANEL))),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        rows, columns = arrays[0].shape
        padded = np.full((rows, -(-columns // PANEL) * PANEL), np.nan, np.float32)
        padded[:, :columns] = arrays[0]
        magnitude = np.abs(padded).view(np.int32).astype(np.int64)
        ordered = np.where(np.signbit(padded), -magnitude, magnitude)
        ordered[np.isnan(padded)] = -(2**31)
        keys = (ordered << 32) | (0x7FFFFFFF - np.arange(padded.shape[1]))
        return (keys.reshape(rows, -1, PANEL).max(2),)


@dataclass(frozen=True)
class BestOfPanels(Op):
    """keys i64 [m, panels] of `PanelKeys` -> the column of the largest, i32 [m]: with it `argmax`."""

    stage = "step"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 2 and types[0].dtype is DType.I64, "keys", *types)
        return (TensorType(DType.I32, types[0].shape[:1]),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (0x7FFFFFFF - (arrays[0].max(1) & 0x7FFFFFFF),)
