"""From weights to blocks, as ops: how lowering packs what kernels read, and how ops say what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llmc.backends.triton.packing_ops import OrderRows, PackBlocks, PackScales, UnpackBlocks, UnpackScales
from llmc.ir.op import Emitter, Value
from llmc.ir.ops.quantized import DequantizeWeight
from llmc.ir.quant import FORMATS
from llmc.ir.types import DType


class Blocked(Protocol):
    """An op that reads a weight in blocks."""

    @property
    def format(self) -> str:
        """`none`, or one of `llmc.ir.quant`."""

    @property
    def rows(self) -> int:
        """Of the weight."""

    @property
    def width(self) -> int:
        """Columns of the weight."""

    @property
    def order(self) -> OrderRows:
        """How its rows are arranged."""


def block_weight(b: Emitter, op: Blocked, weight: Value, compute: DType) -> tuple[Value, ...]:
    """A weight [rows, width] in blocks, in `compute` where it is in no format; with a format blocks and scales."""
    if op.format == "none":
        rounded = weight if weight.type.dtype is compute else b.cast(weight, dtype=compute)
        return (b(PackBlocks(), ordered(b, op, rounded)),)
    assert isinstance(weight.op, DequantizeWeight)
    codes, scales = weight.node.inputs
    return packed_codes(b, op, codes, scales)


def packed_codes(b: Emitter, op: Blocked, codes: Value, scales: Value) -> tuple[Value, Value]:
    """Codes u8 [rows, padded width] and scales f16 [rows, groups] in the kernels' layout."""
    format = FORMATS[op.format]
    blocks = b(PackBlocks(format.bits), ordered(b, op, codes))
    return blocks, b(PackScales(format.group), ordered(b, op, scales))


def natural_weight(b: Emitter, op: Blocked, packed: Sequence[Value]) -> Value:
    """The inverse of `block_weight`: the weight [rows, width] that blocks stand for."""
    back = OrderRows(**{**vars(op.order), "inverse": True})
    if op.format == "none":
        return _ordered(b, back, b.one(UnpackBlocks(op.rows, op.width), packed[0]))
    format = FORMATS[op.format]
    padded = format.padded(op.width)
    codes = b.one(UnpackBlocks(op.rows, padded, format.bits), packed[0])
    scales = b.one(UnpackScales(op.rows, padded // format.group), packed[1])
    pair = (_ordered(b, back, codes), _ordered(b, back, scales))
    result: Value = b.dequantize_weight(*pair, format=op.format, width=op.width)
    return result


def ordered(b: Emitter, op: Blocked, array: Value) -> Value:
    """An array [rows, …] in the op's order."""
    return _ordered(b, op.order, array)


def _ordered(b: Emitter, order: OrderRows, array: Value) -> Value:
    return array if order.order == "natural" else b.one(order, array)
