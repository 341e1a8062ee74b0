"""Matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.ir.op import Array, Emitter, Op, Value
from llmc.ir.ops.elementwise import ACTIVATIONS
from llmc.ir.types import TensorType, broadcast


@dataclass(frozen=True)
class Matmul(Op):
    """Batched matrix product x[..., m, k] @ y[..., k, n]; leading axes broadcast."""

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 2 and min(t.rank for t in types) >= 2, "two operands of rank 2 or more", *types)
        x, y = types
        batch = broadcast(x.shape[:-2], y.shape[:-2])
        self.expects(x.dtype == y.dtype, "operands of one dtype", *types)
        self.expects(x.shape[-1] == y.shape[-2] and batch is not None, "x[..., m, k] and y[..., k, n]", *types)
        assert batch is not None
        return (TensorType(x.dtype, (*batch, x.shape[-2], y.shape[-1])),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0] @ arrays[1],)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        depth = operands[0].shape[-1]
        assert isinstance(depth, int)
        return 2 * results[0].elements * depth


@dataclass(frozen=True)
class Linear(Op):
    """activation(x @ weightᵀ + bias) + residual. Operands: x [m, k], weight [n, k] in its storage dtype, bias [n] if
    `bias`, residual [m, n] in x's dtype if `residual`.

    `activation` is `none` or a name in `ACTIVATIONS`.
    """

    bias: bool = False
    activation: str = "none"
    residual: bool = False

    stage = "fused"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self._check(types)
        result = TensorType(types[0].dtype, (types[0].shape[0], types[1].shape[0]))
        if self.residual:
            self.expects(types[-1] == result, f"residual {result}", *types)
        return (result,)

    def _check(self, types: Sequence[TensorType]) -> None:
        self.expects(self.activation == "none" or self.activation in ACTIVATIONS, "a known activation", self.activation)
        count = 2 + self.bias + self.residual
        self.expects(
            len(types) == count and types[0].rank == types[1].rank == 2, "x, weight, bias and residual", *types
        )
        self.expects(types[0].shape[1] == types[1].shape[1], "x [m, k] and weight [n, k]", *types)
        if self.bias:
            self.expects(types[2].shape == types[1].shape[:1], "bias [n]", *types)

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, weight, *rest = values
        y = _product(b, x, weight)
        if self.bias:
            y = b.add(y, in_dtype_of(b, rest[0], x))
        if self.activation != "none":
            y = _activate(b, y, self.activation)
        return b.add(y, rest[-1]) if self.residual else y


@dataclass(frozen=True)
class GatedLinear(Op):
    """activation(x @ gateᵀ) * (x @ upᵀ). Operands: x [m, k], weight [2n, k]: n rows of gate, then n rows of up;
    bias [2n] if `bias`."""

    activation: str
    bias: bool = False

    stage = "fused"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(self.activation in ACTIVATIONS, "a known activation", self.activation)
        self.expects(len(types) == 2 + self.bias and types[0].rank == types[1].rank == 2, "x, weight and bias", *types)
        rows = types[1].shape[0]
        self.expects(isinstance(rows, int) and rows % 2 == 0, "an even number of weight rows", *types)
        self.expects(types[0].shape[1] == types[1].shape[1], "x [m, k] and weight [2n, k]", *types)
        assert isinstance(rows, int)
        return (TensorType(types[0].dtype, (types[0].shape[0], rows // 2)),)

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, weight, *bias = values
        y = _product(b, x, weight)
        if bias:
            y = b.add(y, in_dtype_of(b, bias[0], x))
        rows = weight.type.shape[0]
        assert isinstance(rows, int)
        gate = b.slice(y, axis=1, start=0, stop=rows // 2)
        up = b.slice(y, axis=1, start=rows // 2, stop=rows)
        result: Value = b.mul(_activate(b, gate, self.activation), up)
        return result


def _product(b: Emitter, x: Value, weight: Value) -> Value:
    transposed = b.transpose(in_dtype_of(b, weight, x), axes=(1, 0))
    result: Value = b.matmul(x, transposed)
    return result


def in_dtype_of(b: Emitter, value: Value, like: Value) -> Value:
    """The value, cast to another's dtype where it has a different one."""
    if value.type.dtype is like.type.dtype:
        return value
    result: Value = b.cast(value, dtype=like.type.dtype)
    return result


def _activate(b: Emitter, x: Value, activation: str) -> Value:
    result: Value = b(ACTIVATIONS[activation](), x)
    return result
