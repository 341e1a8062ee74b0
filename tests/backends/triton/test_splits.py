"""Splits of decode attention: they fill the chip, and no more."""

from __future__ import annotations

import pytest

from llmc.backends.triton.kernels.attention_decode import decode_spec
from llmc.backends.triton.kernels.attention_splits import (
    LEAST_TOKENS,
    MOST_SPLITS,
    grid,
    programs,
    splits,
    tickets,
    workspace_bytes,
)
from llmc.ir.target import GPU_VARIANTS


@pytest.mark.parametrize("name", GPU_VARIANTS)
@pytest.mark.parametrize("sequences", [1, 2, 8, 64])
@pytest.mark.parametrize("kv_heads", [1, 8, 32])
@pytest.mark.parametrize("longest", [1, 255, 256, 4096, 131072])
def test_splits(name: str, sequences: int, kv_heads: int, longest: int) -> None:
    variant = GPU_VARIANTS[name]
    count = splits(sequences, kv_heads, longest, variant)
    assert 1 <= count <= MOST_SPLITS
    room = programs(variant) * variant.multiprocessors
    if count > 1:
        assert count * sequences * kv_heads <= room and longest >= count * LEAST_TOKENS
    # One more would be too many for the chip, too short, or too many to add up.
    more = count + 1
    assert more * sequences * kv_heads > room or more * LEAST_TOKENS > longest or more > MOST_SPLITS


def test_programs_fit_into_shared_memory() -> None:
    assert {v.name: programs(v) for v in GPU_VARIANTS.values()} == {
        "sm_80": 3,
        "sm_86": 2,
        "sm_89": 2,
        "sm_90": 3,
        "sm_100": 3,
    }


def test_grid_and_memory_of_a_spec() -> None:
    variant = GPU_VARIANTS["sm_90"]
    semantics = (28, 4, 80, 0.1, 0, 0.0, False, False, "bf16", "bf16", 16)
    spec = decode_spec(*semantics, sequences=2, longest=8192, variant=variant)
    assert grid(spec, 2) == (2, 4, 32)
    # Seven heads of 64 + 32 columns, their largest scores and totals in 16 places.
    assert workspace_bytes(spec, 2) == 4 * 2 * 4 * 32 * (7 * 96 + 16)
    assert tickets(spec, 2) == 8
    short = decode_spec(*semantics, sequences=2, longest=256, variant=variant)
    assert grid(short, 2) == (2, 4, 1) and workspace_bytes(short, 2) == tickets(short, 2) == 0
    # A window bounds what is read, however long the context.
    window = decode_spec(28, 4, 80, 0.1, 1024, 0.0, False, False, "bf16", "bf16", 16, 2, 1 << 20, variant)
    assert grid(window, 2) == (2, 4, 4)
