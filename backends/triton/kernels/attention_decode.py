"""Attention of one token per sequence: a program for each sequence, kv head and split of the context."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.render import render
from llmc.backends.triton.kernels.attention_parts import (
    EIGHT_BITS,
    LEAST,
    arguments,
    constants,
    expects_fp8,
    reads_words,
    semantics,
)
from llmc.backends.triton.kernels.attention_splits import splits
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GpuVariant


def decode_spec(
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
    sequences: int,
    longest: int,
    variant: GpuVariant,
) -> KernelSpec:
    """The kernel for a bucket of so many sequences, of at most `longest` tokens each. `window` 0: all tokens are seen;
    `soft_cap` 0: none; `dtype`: of q and the result; dtypes by their names. See `splits` for grid and workspace."""
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
    seen = min(longest, window) if window else longest
    wide, thin = head_dim > 128, state_dtype in EIGHT_BITS
    group = num_heads // num_kv_heads
    rows = max(LEAST, 1 << (group - 1).bit_length())
    # Distances take registers, of which codes leave few.
    long = thin and not wide and not (alibi and state_dtype == "i8")
    tile, stages, warps = 128 if long else 64, 3, 4 if rows < 64 else 8
    if dtype == "f32":  # without tensor cores: no more rows than there are, operands in registers
        rows, tile, stages, warps = max(4, 1 << (group - 1).bit_length()), 32, 2, 8
    elif wide or state_dtype == "f32" or (state_dtype == "i8" and variant.capability >= (10, 0)):
        stages = 2
    return KernelSpec.of(
        "attention_decode",
        **told,
        splits=splits(sequences, num_kv_heads, seen, variant),
        rows=rows,
        words=reads_words(state_dtype, head_dim),
        tile=max(tile, block_size),
        stages=stages,
        warps=warps,
    )


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """Arguments: q, key, value, [key_scale, value_scale,] positions, block_tables, [slopes,] [sinks,] out, workspace,
    tickets, dims. Parameters: see `decode_spec`. Raises `LlmcError` for 8-bit floats where the architecture has
    none."""
    parameters = dict(spec.parameters)
    expects_fp8(parameters, target)
    return KernelSource(
        spec.symbol,
        render(
            "triton/attention_decode.py.jinja",
            name=spec.symbol,
            scaled=parameters["state_dtype"] == "i8",
            alibi=parameters["alibi"],
            sinks=parameters["sinks"],
        ),
        (
            *arguments(parameters, "positions_ptr", "block_tables_ptr"),
            ("workspace_ptr", "*fp32"),
            ("tickets_ptr", "*i32"),
            ("dims_ptr", "*i32"),
        ),
        (*constants(parameters, target), ("SPLITS", parameters["splits"])),
        num_warps=parameters["warps"],
        num_stages=parameters["stages"],
        weights=2 * parameters["tile"] * parameters["head_dim"],
    )
