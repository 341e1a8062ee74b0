"""What a choice of a kernel is, and what choosing asks of types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.backends.base import SYMBOLS, KernelSpec
from llmc.ir.op import Value
from llmc.ir.types import DType, Shape, TensorType, symbols_of


@dataclass(frozen=True)
class Selected:
    """A kernel and the values it is given, in the order of its C arguments."""

    spec: KernelSpec
    arguments: tuple[Value, ...]


def rows_dim(type: TensorType) -> int:
    """Which entry of `dims` counts the rows of a [rows, width] value."""
    names = {s.name for s in symbols_of(type.shape[0])}
    assert len(names) == 1, f"rows of {type} are not one symbol"
    return SYMBOLS.index(names.pop())


def width_of(type: TensorType) -> int:
    """Elements of the last axis."""
    width = type.shape[-1]
    assert isinstance(width, int)
    return width


def elements(shape: Shape) -> int:
    """Elements of a shape without symbols."""
    return TensorType(DType.F32, shape).elements


def given(**parameters: float) -> dict[str, Any]:
    """The parameters that a node has at all: a kernel has code for those alone."""
    return {name: value for name, value in parameters.items() if value}
