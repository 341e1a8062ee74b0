"""Rotary position embedding (Su et al., 2021): tables of cosines and sines, and the rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmc.ir.op import Array, Emitter, Op, Value
from llmc.ir.types import DType, TensorType


@dataclass(frozen=True)
class DynamicFrequencies(Op):
    """Inverse frequencies that depend on the position ("dynamic NTK" scaling), for a sequence of length position + 1:
    base' = base · (factor · length / max_positions - (factor - 1)) ^ (d / (d - 2)) beyond `max_positions`, else base;
    frequency i is base' ^ (-2i / d). Operand: positions f32 [t]; result f32 [t, rotary_dim / 2]."""

    base: float
    factor: float
    max_positions: int
    rotary_dim: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 1 and types[0].dtype.is_float, "positions f32[t]", *types)
        return (TensorType(types[0].dtype, (types[0].shape[0], self.rotary_dim // 2)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        length = np.maximum(arrays[0] + 1, self.max_positions)
        stretch = self.factor * length / self.max_positions - (self.factor - 1)
        base = self.base * stretch ** (self.rotary_dim / (self.rotary_dim - 2))
        exponent = np.arange(0, self.rotary_dim, 2) / self.rotary_dim
        return (base[:, None] ** -exponent[None, :],)

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return 2 * results[0].elements


@dataclass(frozen=True)
class RotaryTable(Op):
    """Cosines and sines of position × frequency, times `scaling`. Operands: positions i32 [t], inverse frequencies
    f32 [d] (or [t, d], when they depend on the position); results: cos, sin f32 [t, d]."""

    scaling: float

    stage = "fused"
    result_count = 2

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(
            len(types) == 2 and types[0].rank == 1 and types[0].dtype is DType.I32 and types[1].rank in (1, 2),
            "positions i32[t] and frequencies [d] or [t, d]",
            *types,
        )
        table = TensorType(types[1].dtype, (types[0].shape[0], types[1].shape[-1]))
        return table, table

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        positions, frequencies = values
        tokens = positions.type.shape[0]
        column = b.reshape(b.cast(positions, dtype=frequencies.type.dtype), shape=(tokens, 1))
        if frequencies.type.rank == 1:
            frequencies = b.reshape(frequencies, shape=(1, frequencies.type.shape[0]))
        angles = b.mul(column, frequencies)
        cos, sin = b.cos(angles), b.sin(angles)
        if self.scaling != 1.0:
            cos, sin = b.mul_scalar(cos, value=self.scaling), b.mul_scalar(sin, value=self.scaling)
        return cos, sin


@dataclass(frozen=True)
class Rope(Op):
    """Rotates the first `rotary_dim` elements of every head by its token's angles. Operands: x [t, num_heads ·
    head_dim], cos [t, rotary_dim / 2], sin; result like x.

    `layout` says which elements form a pair: `half` (i and i + rotary_dim / 2) or `interleaved` (2i and 2i + 1).
    """

    num_heads: int
    head_dim: int
    rotary_dim: int
    layout: str = "half"

    stage = "fused"

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(self.layout in ("half", "interleaved"), "layout half or interleaved", self.layout)
        self.expects(self.rotary_dim % 2 == 0 and 0 < self.rotary_dim <= self.head_dim, "an even rotary_dim in a head")
        self.expects(len(types) == 3 and types[0].rank == 2, "x, cos and sin", *types)
        tokens, width = types[0].shape
        table = TensorType(types[0].dtype, (tokens, self.rotary_dim // 2))
        self.expects(width == self.num_heads * self.head_dim, "x [t, num_heads * head_dim]", *types)
        self.expects(types[1] == types[2] == table, f"cos and sin {table}", *types)
        return types[:1]

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, cos, sin = values
        tokens = x.type.shape[0]
        half = self.rotary_dim // 2
        heads = b.reshape(x, shape=(tokens, self.num_heads, self.head_dim))
        cos, sin = (b.reshape(t, shape=(tokens, 1, half)) for t in (cos, sin))
        if self.layout == "half":
            first = b.slice(heads, axis=2, start=0, stop=half)
            second = b.slice(heads, axis=2, start=half, stop=2 * half)
        else:
            first = b.slice(heads, axis=2, start=0, stop=2 * half, step=2)
            second = b.slice(heads, axis=2, start=1, stop=2 * half, step=2)
        turned_first = b.sub(b.mul(first, cos), b.mul(second, sin))
        turned_second = b.add(b.mul(second, cos), b.mul(first, sin))
        if self.layout == "interleaved":
            column = (tokens, self.num_heads, half, 1)
            pair = b.concat(b.reshape(turned_first, shape=column), b.reshape(turned_second, shape=column), axis=3)
            parts = [b.reshape(pair, shape=(tokens, self.num_heads, self.rotary_dim))]
        else:
            parts = [turned_first, turned_second]
        if self.rotary_dim < self.head_dim:
            parts.append(b.slice(heads, axis=2, start=self.rotary_dim, stop=self.head_dim))
        joined = b.concat(*parts, axis=2) if len(parts) > 1 else parts[0]
        result: Value = b.reshape(joined, shape=(tokens, self.num_heads * self.head_dim))
        return result
