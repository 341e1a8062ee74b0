"""Attention's kernels as machine code: for every architecture, without spilled registers, within the budget of
instructions that lets decode run at the speed of memory."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.backends.base import KernelSpec
from llmc.backends.triton.compile import compile_sources
from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.kernels.attention_decode import decode_spec
from llmc.backends.triton.kernels.attention_prefill import prefill_spec
from llmc.backends.triton.kernels.rope_append import append_spec
from llmc.ir.errors import LlmcError
from llmc.ir.target import GPU_VARIANTS, GpuVariant

pytestmark = pytest.mark.static

BYTES = {"bf16": 2, "f8e4m3": 1, "i8": 1}


def semantics(state_dtype: str, variant: GpuVariant, **changed: Any) -> dict[str, Any]:
    """Eight heads of 128 for keys and values, four query heads to each, all in bf16, unless `changed`."""
    values = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "scale": 128**-0.5,
        "window": 0,
        "soft_cap": 0.0,
        "alibi": False,
        "sinks": False,
        "dtype": "bf16",
        "state_dtype": state_dtype,
        "block_size": 16,
        "variant": variant,
    }
    return {**values, **changed}


def decode_of(state_dtype: str, variant: GpuVariant, **changed: Any) -> KernelSpec:
    return decode_spec(**semantics(state_dtype, variant, **changed), sequences=1, longest=32768)


def prefill_of(state_dtype: str, variant: GpuVariant, **changed: Any) -> KernelSpec:
    return prefill_spec(**semantics(state_dtype, variant, **changed), tokens=2048, sequences=64)


@pytest.mark.parametrize("name", GPU_VARIANTS)
def test_compiled_without_spills_and_within_budget(name: str) -> None:
    """A warp's instructions for one element of keys and values, times its lanes: a chip that reads them as fast as its
    memory gives them has issue_rate / (bandwidth / bytes of an element) for each."""
    variant = GPU_VARIANTS[name]
    states = [s for s in BYTES if s != "f8e4m3" or variant.has_fp8]
    decode = {s: decode_of(s, variant) for s in states}
    prefill = {s: prefill_of(s, variant) for s in states}
    every = {"window": 1000, "soft_cap": 30.0, "alibi": True, "sinks": True}
    others = [
        prefill_of("i8", variant, **every),
        decode_of("bf16", variant, head_dim=256),
        decode_of("f32", variant, dtype="f32"),
        decode_of("bf16", variant, alibi=True),
        decode_of("i8", variant, alibi=True),
        prefill_of("bf16", variant, head_dim=256, **every),
        append_spec(32, 8, 128, 128, "half", "f32", "bf16", "i8", 16),
    ]
    specs = [*decode.values(), *prefill.values(), *others]
    made = compile_sources([source_of(s, variant) for s in specs], variant)
    assert {spec.symbol: made[spec.symbol].spills for spec in specs} == {spec.symbol: 0 for spec in specs}
    for state, spec in decode.items():
        spent = made[spec.symbol].instructions_per_weight
        budget = variant.issue_rate / (variant.bandwidth / BYTES[state])
        assert spent is not None and spent < budget, f"{state}: {spent} instructions of {budget:.2f}"
    if variant.capability == (9, 0):
        # Warpgroup products, which take keys and values from shared memory.
        assert b"wgmma.mma_async" in made[prefill["bf16"].symbol].ptx
    assert b"cp.async.cg.shared.global" in made[decode["bf16"].symbol].ptx


def test_eight_bit_floats_need_ada() -> None:
    for spec in (
        decode_of("f8e4m3", GPU_VARIANTS["sm_80"]),
        prefill_of("f8e4m3", GPU_VARIANTS["sm_80"]),
        append_spec(32, 8, 128, 128, "half", "f32", "bf16", "f8e4m3", 16),
    ):
        for name in ("sm_80", "sm_86"):
            with pytest.raises(LlmcError, match="need sm_89 or newer"):
                source_of(spec, GPU_VARIANTS[name])


def test_what_no_kernel_computes_is_refused() -> None:
    variant = GPU_VARIANTS["sm_90"]
    for changed, what in (
        ({"head_dim": 320}, "320"),
        ({"block_size": 8}, "block size 8"),
        ({"dtype": "i8"}, "compute dtype 'i8'"),
        ({"num_kv_heads": 5}, "32 heads over 5"),
    ):
        with pytest.raises(LlmcError, match=what):
            decode_of("bf16", variant, **changed)
    with pytest.raises(LlmcError, match="i32"):
        decode_of("i32", variant)
