"""Table look-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.ir.op import Array, Op
from llmc.ir.types import DType, TensorType


@dataclass(frozen=True)
class Embedding(Op):
    """Rows of a table, converted to `dtype`. Operands: ids i32[n], table [vocab, width]; result [n, width]."""

    dtype: DType

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(
            len(types) == 2 and types[0].rank == 1 and types[0].dtype is DType.I32 and types[1].rank == 2,
            "operands ids i32[n] and table [vocab, width]",
            *types,
        )
        return (TensorType(self.dtype, (types[0].shape[0], types[1].shape[1])),)

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        ids, table = arrays
        return (table[ids].astype(self.dtype.oracle),)

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        ids, table = operands
        return ids.bytes + TensorType(table.dtype, (ids.shape[0], table.shape[1])).bytes
