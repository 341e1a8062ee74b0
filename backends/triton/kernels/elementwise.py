"""Sums, products, scales, activations and conversions, place by place."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.source import POINTERS, KernelSource
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

BLOCK = 1024
"""Columns that one program makes."""

BINARY = ("add", "multiply")


def elementwise_spec(
    operation: str, width: int, operands: tuple[DType, ...], dtype: DType, rows_dim: int, factor: float = 1.0
) -> KernelSpec:
    """`add` or `multiply` two operands [dims[rows_dim], width]; or an activation (`none` too) of one times `factor`."""
    assert len(operands) == 1 + (operation in BINARY)
    return KernelSpec.of(
        "elementwise",
        operation=operation,
        width=width,
        operands=",".join(of.value for of in operands),
        dtype=dtype.value,
        rows_dim=rows_dim,
        factor=factor,
    )


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """See `elementwise_spec`."""
    p = dict(spec.parameters)
    operands = [POINTERS[DType(name)] for name in p["operands"].split(",")]
    return KernelSource(
        spec.symbol,
        render("triton/elementwise.py.jinja", name=spec.symbol, binary=p["operation"] in BINARY),
        (
            *zip(("x_ptr", "y_ptr"), operands, strict=False),
            ("out_ptr", POINTERS[DType(p["dtype"])]),
            ("dims_ptr", "*i32"),
        ),
        (
            ("WIDTH", p["width"]),
            ("BLOCK", BLOCK),
            ("OPERATION", p["operation"]),
            ("FACTOR", p["factor"]),
            ("ROWS_DIM", p["rows_dim"]),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
    )
