"""Rows of a table of tokens."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.packing import COLUMNS, blocks_of
from llmc.backends.triton.source import POINTERS, KernelSource
from llmc.ir.quant import FORMATS
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

BLOCK = 512
"""Columns that one program reads."""


def embedding_spec(rows: int, width: int, dtype: DType, blocks: bool, format: str = "none") -> KernelSpec:
    """Rows f32 of a table [rows, width]: in `dtype` as it is, or in blocks, or in blocks of codes of a `format`."""
    return KernelSpec.of("embedding", rows=rows, width=width, dtype=dtype.value, blocks=blocks, format=format)


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """See `embedding_spec`."""
    p = dict(spec.parameters)
    format = FORMATS.get(p["format"])
    kind = format.kind if format else "blocks" if p["blocks"] else "rows"
    table = "*i32" if format else POINTERS[DType(p["dtype"])]
    scales = (("scale_ptr", "*fp16"),) if format else ()
    return KernelSource(
        spec.symbol,
        render("triton/embedding.py.jinja", name=spec.symbol, kind=kind),
        (("ids_ptr", "*i32"), ("table_ptr", table), *scales, ("out_ptr", "*fp32"), ("dims_ptr", "*i32")),
        (
            ("WIDTH", p["width"]),
            ("COLUMN_BLOCKS", blocks_of(p["width"], COLUMNS)),
            ("BITS", format.bits if format else 0),
            ("ZERO", format.zero if format else 0),
            ("GROUP", format.group if format else 1),
            ("BLOCK", BLOCK),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
    )
