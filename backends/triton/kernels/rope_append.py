"""Rotation and append, for what the product that makes queries, keys and values does not do itself."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.source import POINTERS, KernelSource
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType


def append_spec(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    layout: str,
    dtype: DType,
    state: DType,
    block_size: int,
) -> KernelSpec:
    """Queries rounded to `dtype`, keys and values to `state` (i8: with scales), in pages of `block_size` positions."""
    return KernelSpec.of(
        "rope_append",
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        layout=layout,
        dtype=dtype.value,
        state=state.value,
        block_size=block_size,
    )


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """See `append_spec`."""
    p = dict(spec.parameters)
    state, scaled, rotated = DType(p["state"]), p["state"] == "i8", p["rotary_dim"] > 0
    pointers = [("qkv_ptr", DType.F32)]
    pointers += [("cos_ptr", DType.F32), ("sin_ptr", DType.F32)] if rotated else []
    pointers += [("slot_ptr", DType.I32), ("key_ptr", state), ("value_ptr", state)]
    pointers += [("key_scale_ptr", DType.F32), ("value_scale_ptr", DType.F32)] if scaled else []
    pointers += [("out_ptr", DType(p["dtype"])), ("dims_ptr", DType.I32)]
    return KernelSource(
        spec.symbol,
        render("triton/rope_append.py.jinja", name=spec.symbol, rotated=rotated, scaled=scaled, state=p["state"]),
        tuple((name, POINTERS[of]) for name, of in pointers),
        (
            ("HEADS", p["num_heads"]),
            ("KV_HEADS", p["num_kv_heads"]),
            ("HEAD_DIM", p["head_dim"]),
            ("WIDTH", 1 << (p["head_dim"] - 1).bit_length()),
            ("ROTARY_DIM", p["rotary_dim"]),
            ("INTERLEAVED", p["layout"] == "interleaved"),
            ("BLOCK_SIZE", p["block_size"]),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
        num_warps=1,
    )
