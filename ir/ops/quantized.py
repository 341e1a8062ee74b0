"""Weights as codes and scales (`llmc.ir.quant`), and the products that read them, with activations in 8 bits.

In types a code is u8, whatever the format; costs count its true bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.ir.op import Array, Emitter, Op, Value
from llmc.ir.ops.elementwise import ACTIVATIONS
from llmc.ir.quant import FORMATS, INTEGER_FORMATS
from llmc.ir.quant.format import QuantFormat
from llmc.ir.types import DType, TensorType

_ROWS = 4096
"""Rows of a weight that are dequantized at a time."""

SMALLEST = np.float32(1e-30)
"""A group of activations whose largest magnitude is below this has zero codes: its inverse would overflow."""


class Quantized(Op, abstract=True):
    """An op on weights in a format. A weight [n, k] has codes u8 [n, K] and scales f16 [n, K / group], where K is k
    rounded up to a multiple of the group."""

    format: str

    stage = "fused"

    @property
    def quant(self) -> QuantFormat:
        """The format itself."""
        self.expects(self.format in FORMATS, f"a format of {', '.join(FORMATS)}", self.format)
        return FORMATS[self.format]

    def check_weight(self, width: object, types: Sequence[TensorType]) -> None:
        """`types` are codes and scales of rows of `width` weights."""
        group = self.quant.group
        self.expects(len(types) == 2 and types[0].rank == types[1].rank == 2, "codes and scales", *types)
        codes, scales = types
        self.expects(codes.dtype is DType.U8 and scales.dtype is DType.F16, "codes u8 and scales f16", *types)
        self.expects(isinstance(width, int), "rows of a known width", width)
        assert isinstance(width, int)
        padded = self.quant.padded(width)
        expected = f"codes [n, {padded}] and scales [n, {padded // group}]"
        self.expects(codes.shape[0] == scales.shape[0], expected, *types)
        self.expects(codes.shape[1] == padded and scales.shape[1] == padded // group, expected, *types)

    def weight_bytes(self, codes: TensorType, scales: TensorType) -> int:
        """Bytes that codes and scales take as they are stored."""
        return weight_bytes(self.quant, codes, scales)


def weight_bytes(quant: QuantFormat, codes: TensorType, scales: TensorType) -> int:
    """Bytes that codes u8 [n, K], one an element, and scales take as they are stored, at the format's true bits."""
    return codes.elements * quant.bits // 8 + scales.bytes


def boundary_bytes(quant: QuantFormat, operands: Sequence[TensorType], codes: int = 1) -> int:
    """Bytes that an op reads whose operands `codes` and `codes` + 1 are codes u8 [n, K], one an element, and scales:
    these at the format's true bits, the others whole. What `bytes_read` of an op over such a weight gives."""
    weight = weight_bytes(quant, *operands[codes : codes + 2])
    return weight + sum(t.bytes for t in (*operands[:codes], *operands[codes + 2 :]))


@dataclass(frozen=True)
class QuantizeWeight(Quantized):
    """A weight [n, k] of any float dtype -> codes, scales. Raises `LlmcError` for weights that are not finite or have
    too large a scale (see `QuantFormat.quantize`)."""

    format: str

    result_count = 2

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 2 and types[0].dtype.is_float, "a matrix of floats", *types)
        rows, width = types[0].shape
        self.expects(isinstance(width, int), "rows of a known width", *types)
        assert isinstance(width, int)
        padded = self.quant.padded(width)
        return TensorType(DType.U8, (rows, padded)), TensorType(DType.F16, (rows, padded // self.quant.group))

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        codes, scales = self.quant.quantize(arrays[0])
        return codes, scales.astype(np.float64)

    def pack(
        self, types: Sequence[TensorType], results: Sequence[TensorType], arrays: Sequence[Array]
    ) -> tuple[Array, ...]:
        """In the weight's own dtype, some rows at a time: in float64 a large table would not fit in memory."""
        return self.quant.quantize(arrays[0])


@dataclass(frozen=True)
class DequantizeWeight(Quantized):
    """Codes, scales -> f32 [n, width]: value(code) · scale (see `QuantFormat`), exactly."""

    format: str
    width: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.check_weight(self.width, types)
        return (TensorType(DType.F32, (types[0].shape[0], self.width)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        codes, scales = arrays
        weights = np.empty((len(codes), self.width))
        for start in range(0, len(codes), _ROWS):  # a whole table in float32 beside it would be too much
            block = slice(start, start + _ROWS)
            weights[block] = self.quant.dequantize(codes[block], scales[block], self.width)
        return (weights,)

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        return self.weight_bytes(operands[0], operands[1])


@dataclass(frozen=True)
class QuantizeRows(Op):
    """x f32 [m, k] -> codes i8 [m, K], scales f32 [m, K / group]; a row's partial last group is filled up with zeros.

    Every step is rounded to float32, so that a kernel takes the same codes: for the largest magnitude a of a group
    scale = a · (1/127), inverse = 127 / a (0 where a < 1e-30), code = x · inverse, rounded half to even.
    A group that is not finite has scales that are not, and codes 0.
    """

    group: int = 32

    stage = "fused"
    result_count = 2

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(self.group >= 1, "a group of at least 1", self.group)
        fits = len(types) == 1 and types[0].rank == 2 and types[0].dtype is DType.F32
        self.expects(fits and isinstance(types[0].shape[1], int), "x f32 [m, k]", *types)
        rows, width = types[0].shape
        groups = -(-width // self.group)  # type: ignore[operator]
        return TensorType(DType.I8, (rows, groups * self.group)), TensorType(DType.F32, (rows, groups))

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        (x,) = arrays
        rows, width = x.shape
        groups = -(-width // self.group)
        padded = np.zeros((rows, groups * self.group), np.float32)
        padded[:, :width] = x
        grouped = padded.reshape(rows, groups, self.group)
        largest = np.abs(grouped).max(axis=2)
        scales = largest * np.float32(1 / 127)
        inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=~(largest < SMALLEST))
        with np.errstate(invalid="ignore"):
            codes = np.nan_to_num(np.rint(grouped * inverse[:, :, None]))
        return codes.reshape(padded.shape).astype(np.int64), scales.astype(np.float64)


@dataclass(frozen=True)
class DequantizeRows(Op):
    """Codes i8 [m, K], scales f32 [m, K / group] -> f32 [m, width]: code · scale."""

    width: int

    stage = "fused"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 2 and types[0].rank == types[1].rank == 2, "codes and scales", *types)
        codes, scales = types
        self.expects(codes.dtype is DType.I8 and scales.dtype is DType.F32, "codes i8 and scales f32", *types)
        padded, groups = codes.shape[1], scales.shape[1]
        fits = isinstance(padded, int) and isinstance(groups, int) and groups >= 1 and padded % groups == 0
        self.expects(fits and codes.shape[0] == scales.shape[0], "codes [m, K] and scales [m, K / group]", *types)
        self.expects(0 <= self.width <= padded, f"a width of at most {padded}", *types)  # type: ignore[operator]
        return (TensorType(DType.F32, (codes.shape[0], self.width)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        codes, scales = arrays
        grouped = codes.reshape(*scales.shape, codes.shape[1] // scales.shape[1])
        with np.errstate(invalid="ignore"):  # 0 · inf, where the activations were not finite
            return ((grouped * scales[:, :, None]).reshape(codes.shape)[:, : self.width],)


@dataclass(frozen=True)
class QuantizedLinear(Quantized):
    """`linear` of activations in 8 bits and a weight in a format: activation(x wᵀ + bias) + residual.

    Operands: x f32 [m, k], codes, scales of the weight [n, k], bias [n] if `bias`, residual f32 [m, n] if `residual`.
    """

    format: str
    bias: bool = False
    activation: str = "none"
    residual: bool = False

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        count = 3 + self.bias + self.residual
        self.expects(len(types) == count, "x, codes, scales, bias and residual", *types)
        _check_product(self, types)
        self.expects(self.activation == "none" or self.activation in ACTIVATIONS, "a known activation", self.activation)
        result = TensorType(DType.F32, (types[0].shape[0], types[1].shape[0]))
        if self.bias:
            self.expects(types[3].shape == types[1].shape[:1], "bias [n]", *types)
        if self.residual:
            self.expects(types[-1] == result, f"residual {result}", *types)
        return (result,)

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, codes, scales, *rest = values
        rows, weight = _operands(b, self.quant, x, codes, scales)
        result: Value = b.linear(
            rows, weight, *rest, bias=self.bias, activation=self.activation, residual=self.residual
        )
        return result

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        return boundary_bytes(self.quant, operands)


@dataclass(frozen=True)
class QuantizedGatedLinear(Quantized):
    """`gated_linear` of activations in 8 bits and a weight in a format: activation(x gateᵀ) · (x upᵀ).

    Operands: x f32 [m, k], codes, scales of the weight [2n, k] (n rows of gate, then n of up), bias [2n] if `bias`.
    """

    format: str
    activation: str
    bias: bool = False

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 3 + self.bias, "x, codes, scales and bias", *types)
        _check_product(self, types)
        self.expects(self.activation in ACTIVATIONS, "a known activation", self.activation)
        rows = types[1].shape[0]
        self.expects(isinstance(rows, int) and rows % 2 == 0, "an even number of weight rows", *types)
        assert isinstance(rows, int)
        if self.bias:
            self.expects(types[3].shape == (rows,), "bias [2n]", *types)
        return (TensorType(DType.F32, (types[0].shape[0], rows // 2)),)

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, codes, scales, *bias = values
        rows, weight = _operands(b, self.quant, x, codes, scales)
        result: Value = b.gated_linear(rows, weight, *bias, activation=self.activation, bias=self.bias)
        return result

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        return boundary_bytes(self.quant, operands)


@dataclass(frozen=True)
class QuantizedEmbedding(Quantized):
    """Rows of a table in a format. Operands: ids i32 [n], codes, scales of the table [vocab, width]; f32 [n, width]."""

    format: str
    width: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 3, "ids, codes and scales", *types)
        self.expects(types[0].dtype is DType.I32 and types[0].rank == 1, "ids i32 [n]", *types)
        self.check_weight(self.width, types[1:])
        return (TensorType(DType.F32, (types[0].shape[0], self.width)),)

    def decompose(self, b: Emitter, *values: Value) -> Value:
        ids, codes, scales = values
        rows = b.embedding(ids, codes, dtype=DType.U8), b.embedding(ids, scales, dtype=DType.F16)
        result: Value = b.dequantize_weight(*rows, format=self.format, width=self.width)
        return result

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        ids, *table = operands
        codes, scales = (TensorType(t.dtype, (ids.shape[0], t.shape[1])) for t in table)
        return ids.bytes + self.weight_bytes(codes, scales)


def _check_product(op: Quantized, types: Sequence[TensorType]) -> None:
    """The first operand is x, the next two are codes and scales of a weight as wide, in a format of integers."""
    integers = ", ".join(INTEGER_FORMATS)
    op.expects(op.quant.integer_products, f"a format for activations in 8 bits, {integers}", op.format)
    op.expects(types[0].rank == 2 and types[0].dtype is DType.F32, "x f32 [m, k]", *types)
    op.check_weight(types[0].shape[1], types[1:3])


def _operands(b: Emitter, quant: QuantFormat, x: Value, codes: Value, scales: Value) -> tuple[Value, Value]:
    """x as its codes say, and the weight as its codes say."""
    width = x.type.shape[1]
    rows = b.dequantize_rows(*b.quantize_rows(x, group=quant.group), width=width)
    return rows, b.dequantize_weight(codes, scales, format=quant.name, width=width)
