"""Attention over keys and values in pages: what its kernels for single tokens and for chunks share."""

from __future__ import annotations

from typing import Any

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.source import COMPUTE, POINTERS, PRECISION, KernelSource
from llmc.ir.errors import LlmcError
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

POSITIONS = 64
"""Of a tile, at least, and half of it with wide heads, whose tiles would not fit the registers."""

SMALLEST_ROWS = 16
"""Rows of queries that a matrix unit takes, whether they are there or not."""


def attention_spec(
    kind: str, op: PagedAttention, dtype: DType, state: DType, block_size: int, **parameters: int
) -> KernelSpec:
    """Attention `op` of queries in `dtype` over states in `state`, whose pages have `block_size` positions."""
    return KernelSpec.of(
        kind,
        num_heads=op.num_heads,
        num_kv_heads=op.num_kv_heads,
        head_dim=op.head_dim,
        scale=op.scale,
        window=op.window,
        soft_cap=op.soft_cap,
        sinks=op.sinks,
        dtype=dtype.value,
        state=state.value,
        block_size=block_size,
        pages=max(1, (POSITIONS if op.head_dim <= 128 else POSITIONS // 2) // block_size),
        **parameters,
    )


def attention_source(
    spec: KernelSpec, target: GpuVariant | None, rows: list[str], constants: list[tuple[str, int]], shared: bool
) -> KernelSource:
    """The kernel of a specification. `rows`: the arguments between states and sinks; `constants` of its own; `shared`:
    whether its programs share a workspace."""
    p: dict[str, Any] = dict(spec.parameters)
    dtype, state = DType(p["dtype"]), DType(p["state"])
    if state is DType.F8E4M3 and target is not None and not target.has_fp8:
        raise LlmcError(
            f"{target.name} has no 8-bit floats, which fp8 keys and values need: they come with sm_89;"
            " leave the architecture out, or take --kv-quant int8"
        )
    # 8-bit numbers are exact in f16, and converted to it in one step.
    compute = DType.F16 if state.bits == 8 and dtype is DType.BF16 else dtype
    scaled = state is DType.I8
    text = render(
        f"triton/{spec.kind}.py.jinja",
        name=spec.symbol,
        compute=COMPUTE[compute],
        precision=PRECISION[compute],
        scaled=scaled,
        scales="key_scale_ptr, value_scale_ptr" if scaled else "key_ptr, value_ptr",
        sinks=p["sinks"],
        capped=p["soft_cap"] > 0,
        zero="0" if state.bits == 8 else "0.0",
        bytes=state is DType.F8E4M3,
    )
    width = 1 << (p["head_dim"] - 1).bit_length()
    pointers = [("q_ptr", dtype), ("key_ptr", state), ("value_ptr", state)]
    pointers += [("key_scale_ptr", DType.F32), ("value_scale_ptr", DType.F32)] if scaled else []
    pointers += [(name, DType.I32) for name in rows]
    pointers += [("sink_ptr", DType.F32)] if p["sinks"] else []
    pointers += [("out_ptr", dtype)]
    pointers += [("workspace_ptr", DType.F32), ("tickets_ptr", DType.I32)] if shared else []
    return KernelSource(
        spec.symbol,
        text,
        tuple((name, POINTERS[of]) for name, of in [*pointers, ("dims_ptr", DType.I32)]),
        (
            ("HEADS", p["num_heads"]),
            ("KV_HEADS", p["num_kv_heads"]),
            ("HEAD_DIM", p["head_dim"]),
            ("WIDTH", max(width, 16)),
            *constants,
            ("BLOCK_SIZE", p["block_size"]),
            ("PAGES", p["pages"]),
            ("SCALE", p["scale"]),
            ("WINDOW", p["window"]),
            ("SOFT_CAP", p["soft_cap"]),
            ("STAGES", p["stages"]),
            ("PDL", target is not None and target.has_dependent_launch),
        ),
        num_warps=p["warps"],
        num_stages=p["stages"],
        weights=2 * p["pages"] * p["block_size"] * p["head_dim"],
    )


def shared_rows(num_heads: int, num_kv_heads: int) -> int:
    """Rows that hold the heads which share keys and values: a power of two."""
    return 1 << (num_heads // num_kv_heads - 1).bit_length()
