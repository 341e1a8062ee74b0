"""Attention of chunks of sequences: a program for each tile of tokens of one sequence and kv head."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.kernels.attention_parts import (
    FP8,
    LEAST,
    arguments,
    constants,
    expects_fp8,
    reads_words,
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
    alibi: bool,
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
        alibi=alibi,
        sinks=sinks,
        dtype=dtype,
        state_dtype=state_dtype,
        block_size=block_size,
    )
    group = num_heads // num_kv_heads
    needed = max(LEAST, 1 << (tokens * group - 1).bit_length())
    rows, tile, warps = _shape(dtype, state_dtype, head_dim, block_size, needed, alibi, variant)
    rows = max(rows, 1 << (group - 1).bit_length())
    return KernelSpec.of(
        "attention_prefill",
        **told,
        sequences=1 << (sequences - 1).bit_length(),
        rows=rows,
        # Where products take their operands from shared memory, the order of bytes costs nothing.
        words=reads_words(state_dtype, head_dim) and not (rows >= 64 and _from_shared(variant)),
        tile=max(tile, block_size),
        stages=2,
        warps=warps,
    )


def _from_shared(variant: GpuVariant) -> bool:
    """Whether tensor cores read tiles of 64 rows and more from shared memory: from Hopper on."""
    return variant.capability >= (9, 0)


def _shape(
    dtype: str, state_dtype: str, head_dim: int, block_size: int, needed: int, alibi: bool, variant: GpuVariant
) -> tuple[int, int, int]:
    """Rows, tokens of a tile, warps: the largest that compiles without spilled registers, and no more rows than
    `needed`. A tile has whole blocks, so large blocks make it larger than it was meant to be."""
    codes = state_dtype == "i8"
    small = min(32, needed)
    if dtype == "f32":  # without tensor cores, operands in registers
        return min(16, needed), 16, 8
    if _from_shared(variant):
        # B200's products leave their results outside of registers, and moving them takes some, as distances do.
        crowded = codes and (alibi or variant.capability >= (10, 0))
        if head_dim <= 128 and crowded:
            return (64, 64, 8) if needed >= 64 else (needed, 64, 4)
        if head_dim <= 128:
            return (ROWS, 64, 8) if needed >= ROWS else (needed, 64, 4)
        if head_dim <= 192 and not codes and state_dtype != FP8 and needed >= ROWS and block_size <= 32:
            return ROWS, 32, 8
        most = 32 if block_size > 32 or crowded else 64
        return min(most, needed), 32, 8
    if head_dim <= 128:
        fits = needed >= ROWS and block_size <= (16 if codes else 32)
        return (ROWS, 32, 8) if fits else (small, 32, 4)
    if head_dim <= 192:
        return (64, 16, 8) if needed >= 64 and block_size == 16 and not codes else (small, 32, 4)
    return min(16 if block_size > 32 else 32, needed), 32, 8


def grid(spec: KernelSpec, tokens: int, sequences: int) -> tuple[int, int, int]:
    """The grid: as many tiles as so many tokens of so many sequences can need, kv heads."""
    parameters = dict(spec.parameters)
    held = parameters["rows"] * parameters["num_kv_heads"] // parameters["num_heads"]
    sequences = min(sequences, tokens)
    # Each sequence begins a tile; the tokens beyond fill whole ones at best.
    return sequences + (tokens - sequences) // held, parameters["num_kv_heads"], 1


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """Arguments: q, key, value, [key_scale, value_scale,] positions, query_start, block_tables, [slopes,] [sinks,] out,
    dims. Parameters: see `prefill_spec`. Raises `LlmcError` for 8-bit floats where the architecture has none."""
    parameters = dict(spec.parameters)
    expects_fp8(parameters, target)
    return KernelSource(
        spec.symbol,
        render(
            "triton/attention_prefill.py.jinja",
            name=spec.symbol,
            scaled=parameters["state_dtype"] == "i8",
            alibi=parameters["alibi"],
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
