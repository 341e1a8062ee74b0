"""Attention of chunks of sequences: a program for each tile of tokens of one sequence and kv head."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.kernels.attention_parts import (
    EIGHT_BITS,
    LEAST,
    arguments,
    constants,
    expects_fp8,
    semantics,
)
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GpuVariant

ROWS = 128
"""Rows of a tile, tokens times heads of a group, where tokens are many."""


def prefill_spec(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int,
    soft_cap: float,
    sinks: bool,
    dtype: str,
    state_dtype: str,
    block_size: int,
    tokens: int,
    sequences: int,
    variant: GpuVariant,
) -> KernelSpec:
    """The kernel for a bucket of so many tokens of at most `sequences` sequences; other arguments as in
    `decode_spec`."""
    told = semantics(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        dtype=dtype,
        state_dtype=state_dtype,
        block_size=block_size,
    )
    group = num_heads // num_kv_heads
    thin = state_dtype in EIGHT_BITS
    most, tile, warps = _shape(dtype, state_dtype, head_dim, variant)
    needed = 1 << (tokens * group - 1).bit_length()
    rows = max(LEAST, 1 << (group - 1).bit_length(), min(most, needed))
    return KernelSpec.of(
        "attention_prefill",
        **told,
        sequences=1 << (sequences - 1).bit_length(),
        rows=rows,
        # Where products take their operands from shared memory, the order of bytes costs nothing.
        words=thin and head_dim % 4 == 0 and not (rows >= 64 and _from_shared(variant)),
        tile=max(tile, block_size),
        stages=2,
        warps=warps if rows == most or dtype == "f32" else 4,
    )


def _from_shared(variant: GpuVariant) -> bool:
    """Whether tensor cores read tiles of 64 rows and more from shared memory: from Hopper on."""
    return variant.capability >= (9, 0)


def _shape(dtype: str, state_dtype: str, head_dim: int, variant: GpuVariant) -> tuple[int, int, int]:
    """Rows at most, tokens of a tile, warps: the largest whose sums and operands fit into registers."""
    if dtype == "f32":  # without tensor cores, operands in registers
        return 16, 16, 8
    if _from_shared(variant):
        if head_dim <= 128:
            return ROWS, 64, 8
        if head_dim <= 192 and state_dtype not in EIGHT_BITS:
            return ROWS, 32, 8
        # B200's products leave their results outside of registers, and moving them takes some.
        return (32 if state_dtype == "i8" and variant.capability >= (10, 0) else 64), 32, 8
    if head_dim <= 128:
        return ROWS, 32, 8
    return (64, 16, 8) if head_dim <= 192 else (32, 32, 8)


def grid(spec: KernelSpec, tokens: int, sequences: int) -> tuple[int, int, int]:
    """The grid: as many tiles as so many tokens of so many sequences can need, kv heads."""
    parameters = dict(spec.parameters)
    held = parameters["rows"] * parameters["num_kv_heads"] // parameters["num_heads"]
    sequences = min(sequences, tokens)
    # Each sequence begins a tile; the tokens beyond fill whole ones at best.
    return sequences + (tokens - sequences) // held, parameters["num_kv_heads"], 1


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """Arguments: q, key, value, [key_scale, value_scale,] positions, query_start, block_tables, [sinks,] out, dims.
    Parameters: see `prefill_spec`. Raises `LlmcError` for 8-bit floats where the architecture has none."""
    parameters = dict(spec.parameters)
    expects_fp8(parameters, target)
    return KernelSource(
        spec.symbol,
        render(
            "triton/attention_prefill.py.jinja",
            name=spec.symbol,
            scaled=parameters["state_dtype"] == "i8",
            sinks=parameters["sinks"],
        ),
        (
            *arguments(parameters, "positions_ptr", "query_start_ptr", "block_tables_ptr"),
            ("dims_ptr", "*i32"),
        ),
        (*constants(parameters, target), ("SEQUENCES", parameters["sequences"])),
        num_warps=parameters["warps"],
        num_stages=parameters["stages"],
        weights=2 * parameters["tile"] * parameters["head_dim"],
    )
