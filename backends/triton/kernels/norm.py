"""RMS and layer normalisation of rows, alone and with a residual addition before or after it."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.kernels.common import DIMS, Grid, is_dependent, pointer, power_of_two
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GpuVariant

LARGEST = 16384
"""The widest row that one program keeps in registers."""

_PER_THREAD = 16
"""Elements of a row in one thread: enough loads under way, and few enough registers for a row of `LARGEST`."""


def norm_spec(
    *, norm: str, hidden: int, eps: float, residual: str, out_dtype: str, rows_dim: int, x_dtype: str = "f32"
) -> KernelSpec:
    """`norm` is "rms" or "layer"; a `residual` is added "before" it to x, or "after" it to the result, or is "none".
    Arguments: x [rows, hidden], [residual f32 [rows, hidden] before], weight f32 [hidden], [bias f32 [hidden] of a
    layer norm], [residual after], [sum f32 [rows, hidden], with a residual before], out [rows, hidden], dims."""
    assert norm in ("rms", "layer"), norm
    assert residual in ("none", "before", "after"), residual
    assert 1 <= hidden <= LARGEST, f"rows of {hidden}"
    return KernelSpec.of(
        "norm",
        norm=norm,
        hidden=hidden,
        eps=eps,
        residual=residual,
        out_dtype=out_dtype,
        rows_dim=rows_dim,
        x_dtype=x_dtype,
    )


def norm_grid(spec: KernelSpec, rows: int) -> Grid:
    """A program for each row."""
    return rows, 1, 1


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """The kernel of `norm_spec`."""
    p = dict(spec.parameters)
    layer, residual = p["norm"] == "layer", p["residual"]
    block = power_of_two(p["hidden"])
    arguments = [
        ("x_ptr", pointer(p["x_dtype"])),
        *([("residual_ptr", "*fp32")] if residual == "before" else []),
        ("weight_ptr", "*fp32"),
        *([("bias_ptr", "*fp32")] if layer else []),
        *([("residual_ptr", "*fp32")] if residual == "after" else []),
        *([("sum_ptr", "*fp32")] if residual == "before" else []),
        ("out_ptr", pointer(p["out_dtype"])),
        DIMS,
    ]
    return KernelSource(
        spec.symbol,
        render("triton/norm.py.jinja", name=spec.symbol, layer=layer, residual=residual),
        tuple(arguments),
        (
            ("HIDDEN", p["hidden"]),
            ("EPSILON", p["eps"]),
            ("BLOCK", block),
            ("EARLY", block < LARGEST),  # a thread of a block of 1024 has no registers for parameters that wait
            ("ROWS_DIM", p["rows_dim"]),
            ("PDL", is_dependent(target)),
        ),
        num_warps=max(1, min(32, block // (32 * _PER_THREAD))),
    )
