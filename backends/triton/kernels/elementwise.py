"""Elementwise operations on values of one shape: sums, products, constant factors, activations, conversions."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.kernels.common import DIMS, Grid, ceil_div, is_dependent, pointer
from llmc.backends.triton.source import KernelSource
from llmc.ir.ops.elementwise import ACTIVATIONS
from llmc.ir.target import GpuVariant

BLOCK = 1024
"""Elements of a row that one program takes."""

BINARY = ("add", "multiply")
OPERATIONS = (*BINARY, "scale", "none", "tanh", *ACTIVATIONS)
"""`scale` multiplies by a constant; `none` only converts."""


def elementwise_spec(
    *,
    operation: str,
    width: int,
    x_dtype: str,
    out_dtype: str,
    rows_dim: int,
    y_dtype: str | None = None,
    factor: float | None = None,
) -> KernelSpec:
    """x [rows, width], [y [rows, width], of a binary operation], out [rows, width], dims; the dtypes are f32, f16 or
    bf16, arithmetic is in f32. `factor` belongs to `scale`, `y_dtype` to binary operations."""
    assert operation in OPERATIONS, operation
    assert (y_dtype is not None) == (operation in BINARY), f"{operation} with a second operand {y_dtype}"
    assert (factor is not None) == (operation == "scale"), f"{operation} with a factor {factor}"
    optional = {"y_dtype": y_dtype, "factor": factor}
    return KernelSpec.of(
        "elementwise",
        operation=operation,
        width=width,
        x_dtype=x_dtype,
        out_dtype=out_dtype,
        rows_dim=rows_dim,
        **{name: value for name, value in optional.items() if value is not None},
    )


def elementwise_grid(spec: KernelSpec, rows: int) -> Grid:
    """A program for each row and block of columns."""
    return rows, ceil_div(dict(spec.parameters)["width"], BLOCK), 1


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """The kernel of `elementwise_spec`."""
    p = dict(spec.parameters)
    binary = p["operation"] in BINARY
    return KernelSource(
        spec.symbol,
        render("triton/elementwise.py.jinja", name=spec.symbol, operation=p["operation"], binary=binary),
        (
            ("x_ptr", pointer(p["x_dtype"])),
            *((("y_ptr", pointer(p["y_dtype"])),) if binary else ()),
            ("out_ptr", pointer(p["out_dtype"])),
            DIMS,
        ),
        (
            ("WIDTH", p["width"]),
            *((("FACTOR", p["factor"]),) if "factor" in p else ()),
            ("BLOCK", BLOCK),
            ("ROWS_DIM", p["rows_dim"]),
            ("PDL", is_dependent(target)),
        ),
    )
