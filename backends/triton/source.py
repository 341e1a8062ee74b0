"""What a Triton kernel is before it is compiled or interpreted: a rendered module, its arguments and constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmc.backends.base import KernelSpec
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

POINTERS: dict[DType, str] = {
    DType.F32: "*fp32",
    DType.F16: "*fp16",
    DType.BF16: "*bf16",
    DType.I32: "*i32",
    DType.I8: "*i8",
    DType.U8: "*u8",
    DType.F8E4M3: "*u8",
}
"""Triton's types of pointers to elements of a dtype; 8-bit floats are read as bytes."""

COMPUTE: dict[DType, str] = {DType.F32: "tl.float32", DType.F16: "tl.float16", DType.BF16: "tl.bfloat16"}
"""Triton's names of the dtypes that products take."""

PRECISION = {DType.F32: ', input_precision="ieee"', DType.F16: "", DType.BF16: ""}
"""What a product is told, so that f32 is not rounded to 10 bits of mantissa."""


@dataclass(frozen=True)
class KernelSource:
    """One Triton kernel.

    `text` is a Python module that defines the `triton.jit` function `name`; `arguments` its run-time arguments in
    order with their Triton types (pointers, all aligned to 16 bytes), `constants` its constexpr parameters.
    `weights`: how many weights one pass of the innermost loop takes in, over all threads of a block; 0 where a kernel
    reads none.
    """

    name: str
    text: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | float | bool], ...]
    num_warps: int = 4
    num_stages: int = 3
    weights: int = 0


Maker = Callable[[KernelSpec, GpuVariant | None], KernelSource]
"""The source of a kind of kernel, for an architecture or, with None, for Triton's interpreter."""
