"""Reductions along one axis, softmax with and without a sink, argmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.ir.op import Array, Op
from llmc.ir.types import DType, TensorType, broadcast


class Reduction(Op, abstract=True):
    """Reduces the last axis, kept with size 1."""

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank >= 1, "one operand with an axis to reduce", *types)
        return (TensorType(types[0].dtype, (*types[0].shape[:-1], 1)),)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return operands[0].elements


@dataclass(frozen=True)
class Mean(Reduction):
    """Arithmetic mean of the last axis."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0].mean(-1, keepdims=True),)


@dataclass(frozen=True)
class Sum(Reduction):
    """Sum of the last axis."""

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0].sum(-1, keepdims=True),)


@dataclass(frozen=True)
class Softmax(Op):
    """exp(x - max) / sum, over the last axis; a row of minus infinities gives zeros."""

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank >= 1, "one operand with a last axis", *types)
        return types

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        x = arrays[0]
        peak = x.max(-1, keepdims=True)
        weights = np.exp(x - np.where(np.isfinite(peak), peak, 0.0))
        total = weights.sum(-1, keepdims=True)
        return (weights / np.where(total == 0, 1.0, total),)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return 5 * operands[0].elements


@dataclass(frozen=True)
class SinkSoftmax(Op):
    """Softmax with one more logit in the sum, which has no weight of its own (Xiao et al., 2024): exp(x - max) /
    (sum of exp(x - max) + exp(sink - max)). Operands: x [..., n], sink, which broadcasts to [..., 1]."""

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 2 and types[0].rank >= 1, "x with a last axis and sink", *types)
        x, sink = types
        self.expects(x.dtype == sink.dtype, "operands of one dtype", x, sink)
        row = (*x.shape[:-1], 1)
        self.expects(broadcast(row, sink.shape) == row, "a sink for each row", x, sink)
        return (x,)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        x, sink = arrays
        peak = np.maximum(x.max(-1, keepdims=True), sink)
        weights = np.exp(x - peak)
        return (weights / (weights.sum(-1, keepdims=True) + np.exp(sink - peak)),)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return 5 * operands[0].elements


@dataclass(frozen=True)
class Argmax(Op):
    """Index of the largest element of the last axis (the first, among equals), i32; the axis is dropped."""

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank >= 1, "one operand with an axis to reduce", *types)
        return (TensorType(DType.I32, types[0].shape[:-1]),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (arrays[0].argmax(-1),)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return operands[0].elements
