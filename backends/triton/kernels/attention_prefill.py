"""Attention of a ragged batch: chunks of prompts."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.triton.kernels.attention import SMALLEST_ROWS, attention_source, attention_spec, shared_rows
from llmc.backends.triton.source import KernelSource
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType


def prefill_spec(
    op: PagedAttention, dtype: DType, state: DType, block_size: int, tokens: int, sequences: int
) -> KernelSpec:
    """Attention of up to `tokens` tokens of `sequences` sequences; see `attention_spec`."""
    shared = shared_rows(op.num_heads, op.num_kv_heads)
    rows = 128 if tokens >= 128 and op.head_dim <= 128 else 64 if tokens >= 64 else SMALLEST_ROWS
    each = max(1, min(rows, max(SMALLEST_ROWS, tokens * shared)) // shared)
    while each * shared < SMALLEST_ROWS:
        each *= 2
    bound = 1 << (sequences - 1).bit_length()
    return attention_spec(
        "attention_prefill",
        op,
        dtype,
        state,
        block_size,
        tokens=each,
        shared=shared,
        sequences=bound,
        stages=2 if op.head_dim <= 128 else 1,
        warps=8 if each * shared >= 128 or op.head_dim > 128 else 4,
    )


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """See `prefill_spec`. Raises `LlmcError` where the architecture cannot read the states."""
    p = dict(spec.parameters)
    constants = [("TOKENS", p["tokens"]), ("SHARED", p["shared"]), ("SEQUENCES", p["sequences"])]
    return attention_source(spec, target, ["position_ptr", "query_start_ptr", "table_ptr"], constants, shared=False)


def tiles(spec: KernelSpec, tokens: int, sequences: int) -> int:
    """Tiles at most: each sequence may leave one partly empty."""
    each: int = dict(spec.parameters)["tokens"]
    return min(tokens, tokens // each + sequences)
