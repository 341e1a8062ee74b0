"""Attention of one token of each sequence, the context cut into splits."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.triton.kernels.attention import SMALLEST_ROWS, attention_source, attention_spec, shared_rows
from llmc.backends.triton.source import KernelSource
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.target import GpuVariant
from llmc.ir.types import DType

SHORTEST_SPLIT = 128
"""Positions: a shorter split would take less time to read than to add to the others."""
RESIDENT = 2
"""Programs of a multiprocessor that together keep its loads under way."""


def splits(sequences: int, num_kv_heads: int, longest: int, variant: GpuVariant) -> int:
    """Into how many parts a context of up to `longest` positions is cut, so that all multiprocessors have work."""
    wanted = -(-RESIDENT * variant.multiprocessors // (sequences * num_kv_heads))
    most = -(-longest // SHORTEST_SPLIT)
    return max(1, min(wanted, most, 64))


def decode_spec(op: PagedAttention, dtype: DType, state: DType, block_size: int, count: int) -> KernelSpec:
    """Attention cut into `count` splits; see `attention_spec`."""
    stages, warps = (3, 4) if op.head_dim <= 128 else (2, 8)
    rows = max(SMALLEST_ROWS, shared_rows(op.num_heads, op.num_kv_heads))
    return attention_spec(
        "attention_decode", op, dtype, state, block_size, splits=count, rows=rows, stages=stages, warps=warps
    )


def source(spec: KernelSpec, target: GpuVariant | None) -> KernelSource:
    """See `decode_spec`. Raises `LlmcError` where the architecture cannot read the states."""
    p = dict(spec.parameters)
    constants = [("ROWS", p["rows"]), ("SPLITS", p["splits"])]
    return attention_source(spec, target, ["position_ptr", "table_ptr"], constants, shared=True)


def workspace_bytes(spec: KernelSpec, sequences: int) -> int:
    """What the splits leave for each other."""
    p = dict(spec.parameters)
    width = max(16, 1 << (p["head_dim"] - 1).bit_length())
    return int(4 * sequences * p["num_kv_heads"] * p["splits"] * p["rows"] * (width + 2))
