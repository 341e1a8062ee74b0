"""RMS norms and layer norms of rows."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.source import POINTERS, KernelSource
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType


def norm_spec(width: int, eps: float, centred: bool, dtype: DType, rows_dim: int) -> KernelSpec:
    """A norm of x f32 [dims[rows_dim], width], rounded to `dtype`; `centred`: a layer norm, with a bias."""
    return KernelSpec.of("norm", width=width, eps=eps, centred=centred, dtype=dtype.value, rows_dim=rows_dim)


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """See `norm_spec`."""
    p = dict(spec.parameters)
    block = 1 << (p["width"] - 1).bit_length()
    bias = (("bias_ptr", "*fp32"),) if p["centred"] else ()
    return KernelSource(
        spec.symbol,
        render("triton/norm.py.jinja", name=spec.symbol, centred=p["centred"]),
        (
            ("x_ptr", "*fp32"),
            ("weight_ptr", "*fp32"),
            *bias,
            ("out_ptr", POINTERS[DType(p["dtype"])]),
            ("dims_ptr", "*i32"),
        ),
        (
            ("WIDTH", p["width"]),
            ("BLOCK", block),
            ("EPS", p["eps"]),
            ("ROWS_DIM", p["rows_dim"]),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
        num_warps=max(1, min(16, block // 512)),
    )
