"""What the makers of kernels share: names of types, sizes of blocks."""

from __future__ import annotations

from typing import TypeAlias

from llmc.backends.triton.source import POINTERS
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

Grid: TypeAlias = tuple[int, int, int]
"""Programs of a launch, along three axes."""

DIMS = ("dims_ptr", "*i32")
"""The last argument of every kernel: i32 [4], the sizes of a step."""


def pointer(dtype: str) -> str:
    """Triton's type of a pointer to elements of a dtype, which is named as in types."""
    return POINTERS[DType(dtype)]


def is_dependent(target: GpuVariant | None) -> bool:
    """Whether a kernel waits for its predecessor inside: PDL. Never in the interpreter."""
    return target is not None and target.has_dependent_launch


def ceil_div(value: int, divisor: int) -> int:
    """How many blocks of `divisor` hold `value`."""
    return -(-value // divisor)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`: what a block of Triton's must be."""
    return 1 << max(0, value - 1).bit_length()
