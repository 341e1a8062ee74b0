"""Rows of a matrix by their numbers: the tokens whose logits are wanted."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.source import POINTERS, KernelSource
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

BLOCK = 1024
"""Elements of a row that one program copies."""


def gather_spec(width: int, dtype: DType) -> KernelSpec:
    """Rows [outputs, width] of x [tokens, width]."""
    return KernelSpec.of("gather_rows", width=width, dtype=dtype.value)


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """See `gather_spec`."""
    parameters = dict(spec.parameters)
    pointer = POINTERS[DType(parameters["dtype"])]
    return KernelSource(
        spec.symbol,
        render("triton/gather_rows.py.jinja", name=spec.symbol),
        (("x_ptr", pointer), ("rows_ptr", "*i32"), ("out_ptr", pointer), ("dims_ptr", "*i32")),
        (
            ("WIDTH", parameters["width"]),
            ("BLOCK", BLOCK),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
    )
