"""Packing as ops: the parameters' side of a lowered graph, run once when a package is written."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.backends.triton.packing import (
    COLUMNS,
    ROWS,
    WORD_BYTES,
    blocks_of,
    from_blocks,
    from_pairs,
    from_words,
    row_order,
    to_blocks,
    to_pairs,
    to_words,
)
from llmc.ir.op import Array, Op
from llmc.ir.types import DType, TensorType


class _Packing(Op, abstract=True):
    """A rearrangement of a weight; works on storage arrays."""

    moves_data = True
    stage = "step"


@dataclass(frozen=True)
class OrderRows(_Packing):
    """[n, …] with its rows in another order (see `packing.row_order`); `inverse` puts them back."""

    order: str
    head_dim: int = 0
    rotary_dim: int = 0
    layout: str = "half"
    turned_heads: int = 0
    inverse: bool = False

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and isinstance(types[0].shape[0], int), "one array of a known number of rows")
        rows = types[0].shape[0]
        assert isinstance(rows, int)
        self.expects(self.order != "gated" or rows % 2 == 0, "rows of gate and as many of up", *types)
        self.expects(self.order != "heads" or rows % self.head_dim == 0, "whole heads", *types)
        return types[:1]

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        n = len(arrays[0])
        order = row_order(self.order, n, self.head_dim, self.rotary_dim, self.layout, self.turned_heads)
        return (arrays[0][np.argsort(order) if self.inverse else order],)


@dataclass(frozen=True)
class PackBlocks(_Packing):
    """[n, k] -> [ceil(n / 64), ceil(k / 128), 64, 128], what is missing zero. Codes of `bits` bits (0: no codes) come
    out as words i32 [ceil(n / 64), ceil(k / 128) · bits / 4, 64, 16] (see `packing.to_words`)."""

    bits: int = 0

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 2, "one matrix", *types)
        self.expects(self.bits in (0, 4, 8), "4 or 8 bits, or 0 for what are no codes", self.bits)
        n, k = types[0].concrete({})
        shape = (blocks_of(n, ROWS), blocks_of(k, COLUMNS), ROWS, COLUMNS)
        if self.bits:
            return (TensorType(DType.I32, (shape[0], shape[1] * self.bits // 4, ROWS, WORD_BYTES // 4)),)
        return (TensorType(types[0].dtype, shape),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        blocks = to_blocks(arrays[0])
        return (to_words(blocks, self.bits) if self.bits else blocks,)


@dataclass(frozen=True)
class UnpackBlocks(_Packing):
    """The inverse of `PackBlocks`: [rows, width]."""

    rows: int
    width: int
    bits: int = 0

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 4, "blocks", *types)
        shape = (blocks_of(self.rows, ROWS), blocks_of(self.width, COLUMNS) * (self.bits // 4 or 1))
        self.expects(types[0].shape[:2] == shape, f"{shape[0]} by {shape[1]} blocks", *types)
        return (TensorType(DType.U8 if self.bits else types[0].dtype, (self.rows, self.width)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        blocks = from_words(arrays[0].astype(np.int32), self.bits) if self.bits else arrays[0]
        return (from_blocks(blocks, self.rows, self.width),)


@dataclass(frozen=True)
class PackScales(_Packing):
    """Scales [n, groups] -> [ceil(n / 64), ceil(k / 128), 32, 128 / group, 2] (see `packing.to_pairs`); a group has
    `group` columns, and zeros fill up the last block."""

    group: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 2, "scales [n, groups]", *types)
        n, groups = types[0].concrete({})
        per = COLUMNS // self.group
        return (TensorType(types[0].dtype, (blocks_of(n, ROWS), blocks_of(groups, per), ROWS // 2, per, 2)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (to_pairs(arrays[0], self.group),)


@dataclass(frozen=True)
class UnpackScales(_Packing):
    """The inverse of `PackScales`: [rows, groups]."""

    rows: int
    groups: int

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 1 and types[0].rank == 5, "scales in pairs", *types)
        return (TensorType(types[0].dtype, (self.rows, self.groups)),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        return (from_pairs(arrays[0], self.rows, self.groups),)
