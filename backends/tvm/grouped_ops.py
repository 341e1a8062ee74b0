"""Ops of this backend for `grouped_linear`: a weight for each group, packed in panels, and the product with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.backends.tvm.packing import PANEL, pack, unpack
from llmc.ir.op import Array, Emitter, Op, Value
from llmc.ir.types import TensorType


@dataclass(frozen=True)
class PackGroups(Op):
    """[groups, n, k] -> [groups, ceil(n / 16), k, 16]: the panels of each group (`packing.pack`)."""

    stage = "step"
    moves_data = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 3, "a matrix for each group", *types)
        groups, n, k = types[0].concrete({})
        return (TensorType(types[0].dtype, (groups, -(-n // PANEL), k, PANEL)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.stack([pack(weight) for weight in arrays[0]]),)


@dataclass(frozen=True)
class UnpackGroups(Op):
    """The inverse of `PackGroups`; `rows` is n."""

    rows: int

    stage = "step"
    moves_data = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 4, "panels of each group", *types)
        groups, panels, k, _ = types[0].concrete({})
        self.expects(panels == -(-self.rows // PANEL), f"panels of {self.rows} rows", *types)
        return (TensorType(types[0].dtype, (groups, self.rows, k)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (np.stack([unpack(packed, self.rows) for packed in arrays[0]]),)


@dataclass(frozen=True)
class PackedGroupedLinear(Op):
    """`grouped_linear` with its weights in panels. Operands: x [t, groups · k], panels; result [t, groups · rows]."""

    groups: int
    rows: int

    stage = "step"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, panels = values
        result: Value = b.grouped_linear(x, b.unpack_groups(panels, rows=self.rows), groups=self.groups)
        return result
