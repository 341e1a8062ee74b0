"""Ops that move data without arithmetic, and constants. They work on storage arrays of any dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.ir.op import Array, ConstantData, Op
from llmc.ir.types import Dim, DType, Shape, TensorType, broadcast, evaluate, product


@dataclass(frozen=True)
class Constant(Op):
    """An array known at compile time, named by its hash in the text form."""

    dtype: DType
    value: ConstantData

    moves_data = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(not types, "no operands", *types)
        self.expects(self.value.array.dtype == self.dtype.numpy, f"data of dtype {self.dtype}", self.value)
        return (TensorType(self.dtype, self.value.array.shape),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (self.value.array.astype(self.dtype.oracle),)


@dataclass(frozen=True)
class Reshape(Op):
    """The same elements in another shape, row-major."""

    shape: Shape

    moves_data = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1, "one operand", *types)
        self.expects(product(types[0].shape) == product(self.shape), "as many elements as before", *types)
        return (TensorType(types[0].dtype, self.shape),)

    def evaluate(
        self, types: Sequence[TensorType], arrays: Sequence[Array], sizes: Mapping[str, int]
    ) -> tuple[Array, ...]:
        return (arrays[0].reshape(tuple(evaluate(d, sizes) for d in self.shape)),)


@dataclass(frozen=True)
class Transpose(Op):
    """Axes in another order: result axis i is operand axis `axes[i]`."""

    axes: tuple[int, ...]

    moves_data = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1, "one operand", *types)
        rank = types[0].rank
        self.expects(sorted(self.axes) == list(range(rank)), f"axes that permute rank {rank}", types[0])
        return (TensorType(types[0].dtype, tuple(types[0].shape[a] for a in self.axes)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.transpose(arrays[0], self.axes),)


@dataclass(frozen=True)
class Slice(Op):
    """Elements `start` to `stop` (exclusive) along one axis of fixed size, every `step`th."""

    axis: int
    start: int
    stop: int
    step: int = 1

    moves_data = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and 0 <= self.axis < types[0].rank, "one operand that has the axis", *types)
        size = types[0].shape[self.axis]
        self.expects(isinstance(size, int) and 0 <= self.start < self.stop <= size, "a range inside the axis", *types)
        self.expects(self.step >= 1, "a step of at least 1", *types)
        shape = list(types[0].shape)
        shape[self.axis] = -(-(self.stop - self.start) // self.step)
        return (TensorType(types[0].dtype, tuple(shape)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        index = [slice(None)] * arrays[0].ndim
        index[self.axis] = slice(self.start, self.stop, self.step)
        return (arrays[0][tuple(index)],)


@dataclass(frozen=True)
class Concat(Op):
    """Operands joined along one axis."""

    axis: int

    moves_data = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) >= 1 and 0 <= self.axis < types[0].rank, "operands that have the axis", *types)
        total: Dim = 0
        for t in types:
            others = [d for i, d in enumerate(t.shape) if i != self.axis]
            expected = [d for i, d in enumerate(types[0].shape) if i != self.axis]
            self.expects(t.dtype == types[0].dtype and others == expected, "operands alike but for the axis", *types)
            total = total + t.shape[self.axis]
        shape = list(types[0].shape)
        shape[self.axis] = total
        return (TensorType(types[0].dtype, tuple(shape)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.concatenate(arrays, self.axis),)


@dataclass(frozen=True)
class Expand(Op):
    """Axes of size 1 repeated (and new leading axes added) to reach `shape`, by numpy's broadcasting rule."""

    shape: Shape

    moves_data = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1, "one operand", *types)
        reached = broadcast(types[0].shape, self.shape)
        self.expects(reached == self.shape, f"a shape that broadcasts to [{', '.join(map(str, self.shape))}]", *types)
        return (TensorType(types[0].dtype, self.shape),)

    def evaluate(
        self, types: Sequence[TensorType], arrays: Sequence[Array], sizes: Mapping[str, int]
    ) -> tuple[Array, ...]:
        return (np.broadcast_to(arrays[0], tuple(evaluate(d, sizes) for d in self.shape)),)


@dataclass(frozen=True)
class GatherRows(Op):
    """Rows of x at the given indices. Operands: x [n, ...], rows i32 [m]; result [m, ...]."""

    moves_data = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(
            len(types) == 2 and types[0].rank >= 1 and types[1].rank == 1 and types[1].dtype is DType.I32,
            "operands x [n, ...] and rows i32[m]",
            *types,
        )
        return (TensorType(types[0].dtype, (types[1].shape[0], *types[0].shape[1:])),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0][arrays[1]],)
