"""Rows of an embedding table by token ids."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.kernels.common import DIMS, Grid, ceil_div, is_dependent, pointer
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GpuVariant

BLOCK = 1024
"""Elements of a row that one program copies."""


def embedding_spec(*, hidden: int, table_dtype: str, out_dtype: str, rows_dim: int) -> KernelSpec:
    """ids i32 [rows], table [vocab, hidden], out [rows, hidden], dims. The dtypes are f32, f16 or bf16."""
    return KernelSpec.of("embedding", hidden=hidden, table_dtype=table_dtype, out_dtype=out_dtype, rows_dim=rows_dim)


def embedding_grid(spec: KernelSpec, rows: int) -> Grid:
    """A program for each row and block of columns."""
    return rows, ceil_div(dict(spec.parameters)["hidden"], BLOCK), 1


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """The kernel of `embedding_spec`."""
    p = dict(spec.parameters)
    return KernelSource(
        spec.symbol,
        render("triton/embedding.py.jinja", name=spec.symbol),
        (
            ("ids_ptr", "*i32"),
            ("table_ptr", pointer(p["table_dtype"])),
            ("out_ptr", pointer(p["out_dtype"])),
            DIMS,
        ),
        (("HIDDEN", p["hidden"]), ("BLOCK", BLOCK), ("ROWS_DIM", p["rows_dim"]), ("PDL", is_dependent(target))),
    )
