"""Elementwise ops: operands broadcast by numpy's rule and share one dtype; the result has it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.ir.op import Array, Emitter, Op, Value
from llmc.ir.types import DType, TensorType, broadcast

_erf = np.frompyfunc(math.erf, 1, 1)


class Binary(Op, abstract=True):
    """Two operands of one dtype, broadcast against each other."""

    elementwise = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 2, "two operands", *types)
        x, y = types
        shape = broadcast(x.shape, y.shape)
        self.expects(x.dtype == y.dtype, "operands of one dtype", x, y)
        self.expects(shape is not None, "shapes that broadcast", x, y)
        assert shape is not None
        return (TensorType(x.dtype, shape),)


class Unary(Op, abstract=True):
    """One operand; the result has its type."""

    elementwise = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1, "one operand", *types)
        return types


@dataclass(frozen=True)
class Add(Binary):
    """x + y."""

    commutative = True

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0] + arrays[1],)


@dataclass(frozen=True)
class Sub(Binary):
    """x - y."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0] - arrays[1],)


@dataclass(frozen=True)
class Mul(Binary):
    """x * y."""

    commutative = True

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0] * arrays[1],)


@dataclass(frozen=True)
class Div(Binary):
    """x / y."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0] / arrays[1],)


@dataclass(frozen=True)
class AddScalar(Unary):
    """x + value; of integers, a whole number."""

    value: float

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        (result,) = super().infer(*types)
        self.expects(result.dtype.is_float or self.value == int(self.value), "a whole number for integers", result)
        return (result,)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return ((arrays[0] + self.value).astype(arrays[0].dtype, copy=False),)


@dataclass(frozen=True)
class MulScalar(Unary):
    """x * value."""

    value: float

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0] * self.value,)


@dataclass(frozen=True)
class PowScalar(Unary):
    """x ** exponent."""

    exponent: float

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0] ** self.exponent,)


@dataclass(frozen=True)
class Neg(Unary):
    """-x."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (-arrays[0],)


@dataclass(frozen=True)
class Exp(Unary):
    """e ** x."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.exp(arrays[0]),)


@dataclass(frozen=True)
class Rsqrt(Unary):
    """1 / sqrt(x)."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (1.0 / np.sqrt(arrays[0]),)


@dataclass(frozen=True)
class Tanh(Unary):
    """Hyperbolic tangent."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.tanh(arrays[0]),)


@dataclass(frozen=True)
class Sigmoid(Unary):
    """1 / (1 + e ** -x)."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        x = arrays[0]
        small = np.exp(-np.abs(x))
        return (np.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small)),)


@dataclass(frozen=True)
class Erf(Unary):
    """Error function."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.asarray(_erf(arrays[0]), np.float64),)


@dataclass(frozen=True)
class Relu(Unary):
    """max(x, 0)."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.maximum(arrays[0], 0),)


@dataclass(frozen=True)
class Clamp(Unary):
    """x within [low, high]; an infinite bound is none. NaN stays."""

    low: float
    high: float

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(self.low <= self.high, "low at most high", self.low, self.high)
        return super().infer(*types)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.clip(arrays[0], self.low, self.high),)


@dataclass(frozen=True)
class Cos(Unary):
    """Cosine of an angle in radians."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.cos(arrays[0]),)


@dataclass(frozen=True)
class Sin(Unary):
    """Sine of an angle in radians."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.sin(arrays[0]),)


@dataclass(frozen=True)
class GreaterEqual(Binary):
    """x >= y, as bool."""

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        return (TensorType(DType.BOOL, super().infer(*types)[0].shape),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0] >= arrays[1],)


@dataclass(frozen=True)
class LogicalAnd(Binary):
    """x and y, of bools."""

    commutative = True

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.logical_and(*arrays),)


@dataclass(frozen=True)
class Mask(Op):
    """Where `mask` holds x, else `value` (minus infinity before a softmax). Operands: x, mask bool; they broadcast."""

    value: float

    elementwise = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 2 and types[1].dtype is DType.BOOL, "operands x and mask: bool", *types)
        shape = broadcast(types[0].shape, types[1].shape)
        self.expects(shape is not None, "shapes that broadcast", *types)
        assert shape is not None
        return (TensorType(types[0].dtype, shape),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.where(arrays[1], arrays[0], self.value),)


@dataclass(frozen=True)
class Cast(Op):
    """The same values in another dtype. Casting to a float of 16 or 8 bits rounds to nearest even, in the oracle too;
    to f8e4m3 it saturates (see `DType.store`)."""

    dtype: DType

    elementwise = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1, "one operand", *types)
        return (TensorType(self.dtype, types[0].shape),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        x = arrays[0]
        if self.dtype in (DType.F16, DType.BF16, DType.F8E4M3):
            x = self.dtype.store(x.astype(np.float32))
        return (x.astype(self.dtype.oracle, copy=False),)  # a weight in float64 is large enough once

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return 0


@dataclass(frozen=True)
class Silu(Unary):
    """x * sigmoid(x)."""

    stage = "fused"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        (x,) = values
        result: Value = b.mul(x, b.sigmoid(x))
        return result


@dataclass(frozen=True)
class GeluTanh(Unary):
    """GELU by its tanh approximation (Hendrycks and Gimpel, 2016): x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))."""

    stage = "fused"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        (x,) = values
        cube = b.mul_scalar(b.pow_scalar(x, exponent=3.0), value=0.044715)
        inner = b.mul_scalar(b.add(x, cube), value=math.sqrt(2.0 / math.pi))
        result: Value = b.mul(b.mul_scalar(x, value=0.5), b.add_scalar(b.tanh(inner), value=1.0))
        return result


@dataclass(frozen=True)
class GeluErf(Unary):
    """GELU exactly: x/2 · (1 + erf(x / √2))."""

    stage = "fused"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        (x,) = values
        inner = b.erf(b.mul_scalar(x, value=math.sqrt(0.5)))
        result: Value = b.mul(b.mul_scalar(x, value=0.5), b.add_scalar(inner, value=1.0))
        return result


ACTIVATIONS: dict[str, type[Op]] = {"silu": Silu, "gelu_tanh": GeluTanh, "gelu_erf": GeluErf, "relu": Relu}
"""Activations that linear ops can apply to their result, by attribute value."""
