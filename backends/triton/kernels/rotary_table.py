"""Tables of cosines and sines."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GpuVariant


def table_spec(half: int, scaling: float) -> KernelSpec:
    """Cosines and sines [tokens, half] of positions times frequencies f32 [half], times `scaling`."""
    return KernelSpec.of("rotary_table", half=half, scaling=scaling, dynamic=False, base=1.0, factor=1.0, longest=1)


def dynamic_table_spec(half: int, scaling: float, base: float, factor: float, longest: int) -> KernelSpec:
    """The same of positions alone: see `DynamicFrequencies`, `longest` being its `max_positions`."""
    return KernelSpec.of(
        "rotary_table", half=half, scaling=scaling, dynamic=True, base=base, factor=factor, longest=longest
    )


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """See `table_spec`."""
    p = dict(spec.parameters)
    frequency = () if p["dynamic"] else (("frequency_ptr", "*fp32"),)
    return KernelSource(
        spec.symbol,
        render("triton/rotary_table.py.jinja", name=spec.symbol, dynamic=p["dynamic"]),
        (("position_ptr", "*i32"), *frequency, ("cos_ptr", "*fp32"), ("sin_ptr", "*fp32"), ("dims_ptr", "*i32")),
        (
            ("HALF", p["half"]),
            ("BLOCK", 1 << (p["half"] - 1).bit_length()),
            ("SCALING", p["scaling"]),
            ("BASE", p["base"]),
            ("FACTOR", p["factor"]),
            ("LONGEST", float(p["longest"])),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
        num_warps=1,
    )
