"""What kernel specifications say of a value's shape."""

from __future__ import annotations

from llmc.backends.base import SYMBOLS
from llmc.ir.types import TensorType, symbols_of


def rows_dim(type: TensorType) -> int:
    """Which entry of `dims` counts the rows of a [rows, width] value."""
    names = {s.name for s in symbols_of(type.shape[0])}
    assert len(names) == 1, f"rows of {type} are not one symbol"
    return SYMBOLS.index(names.pop())


def width(type: TensorType) -> int:
    """The size of the last axis."""
    size = type.shape[-1]
    assert isinstance(size, int)
    return size
