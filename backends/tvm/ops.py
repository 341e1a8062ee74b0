"""Ops of this backend: weights packed in panels of rows, and the ops that read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.backends.tvm.packing import PANEL, pack, pack_gated, unpack, unpack_gated
from llmc.ir.op import Array, Emitter, Op, Value
from llmc.ir.types import DType, Shape, TensorType


class Packing(Op, abstract=True):
    """A rearrangement of a weight, or of each of several [experts, ...]; works on storage arrays."""

    moves_data = True
    stage = "step"

    def check_rank(self, types: Sequence[TensorType], rank: int, what: str) -> tuple[Shape, Sequence[int]]:
        """One operand of that rank, or with an axis of experts before it: that axis, if there, and the others."""
        self.expects(len(types) == 1 and types[0].rank in (rank, rank + 1), what, *types)
        sizes = types[0].concrete({})
        return sizes[:-rank], sizes[-rank:]


def for_each(function: Callable[[Array], Array], weights: Array, rank: int) -> Array:
    """The function of an array of that rank, or of each in an array of one rank more."""
    return function(weights) if weights.ndim == rank else np.stack([function(w) for w in weights])


@dataclass(frozen=True)
class PackPanels(Packing):
    """[n, k] -> [ceil(n / 16), k, 16]: a lane is a row; missing rows are zero."""

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        experts, (n, k) = self.check_rank(types, 2, "one matrix")
        return (TensorType(types[0].dtype, (*experts, -(-n // PANEL), k, PANEL)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (for_each(pack, arrays[0], 2),)


@dataclass(frozen=True)
class UnpackPanels(Packing):
    """[ceil(n / 16), k, 16] -> [n, k]: the inverse of `PackPanels`."""

    rows: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        experts, (panels, k, _) = self.check_rank(types, 3, "packed panels")
        self.expects(panels == -(-self.rows // PANEL), f"panels of {self.rows} rows", *types)
        return (TensorType(types[0].dtype, (*experts, self.rows, k)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (for_each(lambda w: unpack(w, self.rows), arrays[0], 3),)


@dataclass(frozen=True)
class PackGated(Packing):
    """[2n, k], gate rows then up rows -> [ceil(n / 8), k, 16]: in each panel 8 rows of gate, then their 8 of up."""

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        experts, (n, k) = self.check_rank(types, 2, "one matrix")
        return (TensorType(types[0].dtype, (*experts, -(-(n // 2) * 2 // PANEL), k, PANEL)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (for_each(lambda w: pack_gated(*np.split(w, 2)), arrays[0], 2),)


@dataclass(frozen=True)
class UnpackGated(Packing):
    """The inverse of `PackGated`; `rows` is the number of gate rows."""

    rows: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        experts, (_, k, _) = self.check_rank(types, 3, "packed panels")
        return (TensorType(types[0].dtype, (*experts, 2 * self.rows, k)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (for_each(lambda w: np.concatenate(unpack_gated(w, self.rows)), arrays[0], 3),)


@dataclass(frozen=True)
class PackedLinear(Op):
    """`linear` with its weight in panels. Operands: x [m, k], panels, [bias f32 [rows]], [residual f32
    [m, rows]]; result [m, rows]."""

    rows: int
    bias: bool = False
    activation: str = "none"
    residual: bool = False

    stage = "step"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, packed, *rest = values
        weight = b.unpack_panels(packed, rows=self.rows)
        result: Value = b.linear(x, weight, *rest, bias=self.bias, activation=self.activation, residual=self.residual)
        return result


@dataclass(frozen=True)
class PackedGatedLinear(Op):
    """`gated_linear` with its weight in gated panels. Operands: x [m, k], panels; result [m, rows]."""

    rows: int
    activation: str

    stage = "step"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, packed = values
        result: Value = b.gated_linear(x, b.unpack_gated(packed, rows=self.rows), activation=self.activation)
        return result


@dataclass(frozen=True)
class PackedEmbedding(Op):
    """`embedding` that reads rows out of panels, so that a tied head and its table are stored once.

    Operands: ids i32 [n], panels; result f32 [n, k].
    """

    rows: int

    stage = "step"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        ids, packed = values
        result: Value = b.embedding(ids, b.unpack_panels(packed, rows=self.rows), dtype=DType.F32)
        return result

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        """Only the rows that are asked for."""
        ids, packed = operands
        return ids.bytes + ids.elements * packed.bytes // self.rows
