"""Tables of cosines and sines for rotary position embeddings, of fixed and of dynamic frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.kernels.common import DIMS, Grid, is_dependent, power_of_two
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GpuVariant


def rotary_table_spec(*, rotary_dim: int, scaling: float, rows_dim: int) -> KernelSpec:
    """positions i32 [rows], frequencies f32 [rotary_dim / 2], cos and sin f32 [rows, rotary_dim / 2], dims.

    The angle is position · frequency rounded to f32, as frameworks take it; |angle| < 2^20. Cosine and sine of it are
    those of f64, times `scaling`.
    """
    return KernelSpec.of("rotary_table", rotary_dim=rotary_dim, scaling=scaling, rows_dim=rows_dim)


def dynamic_rotary_table_spec(
    *, rotary_dim: int, base: float, factor: float, max_positions: int, scaling: float, rows_dim: int
) -> KernelSpec:
    """positions i32 [rows], cos and sin f32 [rows, rotary_dim / 2], dims: `DynamicRotaryTable`."""
    return KernelSpec.of(
        "dynamic_rotary_table",
        rotary_dim=rotary_dim,
        base=base,
        factor=factor,
        max_positions=max_positions,
        scaling=scaling,
        rows_dim=rows_dim,
    )


def rotary_table_grid(spec: KernelSpec, rows: int) -> Grid:
    """A program for each row; the same for both kinds."""
    return rows, 1, 1


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """The kernel of `rotary_table_spec`."""
    return _table(spec, target, (("frequencies_ptr", "*fp32"),), ())


def dynamic_source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """The kernel of `dynamic_rotary_table_spec`."""
    p = dict(spec.parameters)
    width = p["rotary_dim"]
    constants = (
        ("LOG_BASE", math.log(p["base"])),
        ("STRETCH", p["factor"] / p["max_positions"]),
        ("OFFSET", float(p["factor"] - 1)),
        ("POWER", width / (width - 2) if width > 2 else 0.0),
        ("MAX_POSITIONS", p["max_positions"]),
    )
    return _table(spec, target, (), constants)


def _table(
    spec: KernelSpec,
    target: GpuVariant | None,
    operands: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, int | float | bool], ...],
) -> KernelSource:
    p = dict(spec.parameters)
    half = p["rotary_dim"] // 2
    block = power_of_two(half)
    text = render(
        "triton/rotary_table.py.jinja",
        name=spec.symbol,
        dynamic=bool(constants),
        sine=_horner([(-1) ** i / math.factorial(2 * i + 1) for i in range(8)]),
        cosine=_horner([(-1) ** i / math.factorial(2 * i) for i in range(9)]),
    )
    return KernelSource(
        spec.symbol,
        text,
        (("positions_ptr", "*i32"), *operands, ("cos_ptr", "*fp32"), ("sin_ptr", "*fp32"), DIMS),
        (
            ("HALF", half),
            ("SCALING", p["scaling"]),
            *constants,
            ("BLOCK", block),
            ("ROWS_DIM", p["rows_dim"]),
            ("PDL", is_dependent(target)),
        ),
        num_warps=max(1, min(4, block // 32)),
    )


def _horner(coefficients: Sequence[float]) -> str:
    """A polynomial in `square` as text, lowest power first."""
    result = repr(coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = f"({result} * square + {coefficient!r})"
    return result
