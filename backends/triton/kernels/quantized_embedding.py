"""Rows of a table of codes and scales by token ids, as floats."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.kernels.common import DIMS, Grid, ceil_div, is_dependent, pointer
from llmc.backends.triton.kernels.embedding import BLOCK
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GpuVariant


def quantized_embedding_spec(
    *, hidden: int, bits: int, group: int, kind: str, out_dtype: str, rows_dim: int
) -> KernelSpec:
    """ids i32 [rows], codes u8 [vocab, K · bits / 8], scales f16 [vocab, K / group], out [rows, hidden], dims.

    K is `hidden` rounded up to a multiple of the group; codes are packed as by `QuantFormat.pack`. `kind` says what a
    code stands for: "integer" (code - 2^(bits - 1)) or "e4m3" (8 bits; runs on architectures that lack the type, too).
    """
    assert (kind, bits) in (("integer", 4), ("integer", 8), ("e4m3", 8)), f"no codes {kind} of {bits} bits"
    return KernelSpec.of(
        "quantized_embedding",
        hidden=hidden,
        bits=bits,
        group=group,
        code_kind=kind,
        out_dtype=out_dtype,
        rows_dim=rows_dim,
    )


def quantized_embedding_grid(spec: KernelSpec, rows: int) -> Grid:
    """A program for each row and block of columns."""
    return rows, ceil_div(dict(spec.parameters)["hidden"], BLOCK), 1


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """The kernel of `quantized_embedding_spec`."""
    p = dict(spec.parameters)
    return KernelSource(
        spec.symbol,
        render("triton/quantized_embedding.py.jinja", name=spec.symbol),
        (
            ("ids_ptr", "*i32"),
            ("codes_ptr", "*u8"),
            ("scales_ptr", "*fp16"),
            ("out_ptr", pointer(p["out_dtype"])),
            DIMS,
        ),
        (
            ("HIDDEN", p["hidden"]),
            ("BITS", p["bits"]),
            ("GROUP", p["group"]),
            ("E4M3", p["code_kind"] == "e4m3"),
            ("BLOCK", BLOCK),
            ("ROWS_DIM", p["rows_dim"]),
            ("PDL", is_dependent(target)),
        ),
    )
