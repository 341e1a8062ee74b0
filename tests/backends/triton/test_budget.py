"""What compiled kernels take of a chip: no register spilled in a loop, and no more instructions for a weight, or for an
element of a key or value, than the chip can start while memory delivers it."""

from __future__ import annotations

from typing import Any

import pytest

from llmc.backends.triton.compile import Compiled, compile_sources
from llmc.backends.triton.kernels import attention_decode, attention_prefill
from llmc.backends.triton.kernels.linear import source
from llmc.backends.triton.ops import BlockLinear
from llmc.backends.triton.products import product_kernel
from llmc.backends.triton.source import KernelSource
from llmc.ir.errors import LlmcError
from llmc.ir.quant import FORMATS
from llmc.ir.target import GPU_VARIANTS
from llmc.ir.types import DType

DELIVERED = 0.9
"""Of a datasheet's bandwidth: an H200 copies 4.3 TB/s of its 4.8."""

BF16 = DType.BF16

SHORT = {
    # Memory of 8 TB/s brings two weights where an H200's brings one, and the clock is the same. Up to 8 tokens fit; with
    # 16, pairs of x are put together in registers anew for each 16 rows, which takes 0.4 instructions a weight.
    ("sm_100", "q4"): 3.1,
    ("sm_100", "q4g64"): 2.85,
    ("sm_100", "q4g128"): 2.7,
}
"""Known to be bound by instructions, with the most that they may take, of 1 or 16 tokens."""


def linear(format: str, rows: int, variant: str) -> KernelSource:
    """The projection of queries, keys and values of an 8B model."""
    op = BlockLinear(format, 6144, 4096, False, "none", False, None, BF16, BF16)
    spec, _ = product_kernel(op, BF16, BF16, rows, 0, GPU_VARIANTS[variant])
    return source(spec, GPU_VARIANTS[variant])


def attention(head_dim: int, state: DType) -> dict[str, Any]:
    """Four heads of queries to one of keys, as in an 8B model."""
    return {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "window": 0,
        "soft_cap": 0.0,
        "sinks": False,
        "dtype": "bf16",
        "state_dtype": state.value,
        "block_size": 16,
    }


@pytest.mark.parametrize("name", GPU_VARIANTS)
def test_products_of_few_tokens_are_bound_by_memory(name: str) -> None:
    variant = GPU_VARIANTS[name]
    formats = [f for f in ("none", *FORMATS) if variant.has_fp8 or f != "fp8"]
    sources = {(f, m): linear(f, m, name) for f in formats for m in (1, 16)}
    compiled = compile_sources(list({s.name: s for s in sources.values()}.values()), variant)
    for format in formats:
        kernels = [compiled[kernel_source.name] for (of, _), kernel_source in sources.items() if of == format]
        assert not any(kernel.loop_spills for kernel in kernels), format
        bits = FORMATS[format].bits_per_weight if format in FORMATS else 16
        budget = variant.issue_rate * bits / 8 / (DELIVERED * variant.bandwidth)
        known = SHORT.get((name, format))
        worst = max(map(_counted, kernels))
        assert worst <= (known or budget), f"{format}: {worst:.2f} instructions a weight, of {budget:.2f}"
        assert known is None or worst > budget, f"{format} on {name} fits its budget now: take it out of SHORT"


@pytest.mark.parametrize("name", GPU_VARIANTS)
def test_attention_is_bound_by_memory(name: str) -> None:
    variant = GPU_VARIANTS[name]
    states = [s for s in (BF16, DType.F8E4M3, DType.I8) if variant.has_fp8 or s is not DType.F8E4M3]
    sources = {}
    for state in states:
        spec = attention_decode.decode_spec(**attention(128, state), sequences=1, longest=8192, variant=variant)
        sources[state] = attention_decode.source(spec, variant)
    compiled = compile_sources(list(sources.values()), variant)
    for state, kernel_source in sources.items():
        kernel = compiled[kernel_source.name]
        assert kernel.loop_spills == 0, state
        size = state.itemsize + (4 / 128 if state is DType.I8 else 0)
        budget = variant.issue_rate * size / (DELIVERED * variant.bandwidth)
        given = _counted(kernel)
        known = {("sm_100", DType.I8): 8.0, ("sm_100", DType.F8E4M3): 6.0}.get((name, state))
        assert given <= (known or budget), f"{state}: {given:.2f} instructions an element, of {budget:.2f}"


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_no_head_is_too_wide_for_the_registers(head_dim: int) -> None:
    variant = GPU_VARIANTS["sm_90"]
    told = attention(head_dim, BF16)
    decode = attention_decode.decode_spec(**told, sequences=8, longest=8192, variant=variant)
    prefill = [
        attention_prefill.source(
            attention_prefill.prefill_spec(**told, tokens=tokens, sequences=8, variant=variant), variant
        )
        for tokens in (16, 1024)
    ]
    for kernel in compile_sources([attention_decode.source(decode, variant), *prefill], variant).values():
        assert kernel.loop_spills == 0, kernel.function


@pytest.mark.parametrize("name", ["sm_80", "sm_86"])
def test_8_bit_floats_are_refused_where_the_chip_has_none(name: str) -> None:
    with pytest.raises(LlmcError, match=f"{name} has no 8-bit floats, which fp8 need.*sm_89.*q8"):
        linear("fp8", 1, name)
    told = attention(64, DType.F8E4M3)
    spec = attention_decode.decode_spec(**told, sequences=8, longest=256, variant=GPU_VARIANTS[name])
    with pytest.raises(LlmcError, match=f"f8e4m3 need sm_89 or newer, and {name} is older"):
        attention_decode.source(spec, GPU_VARIANTS[name])


def test_large_tiles_keep_their_registers() -> None:
    variant = GPU_VARIANTS["sm_90"]
    sources = [linear(format, 2048, "sm_90") for format in ("none", "q8g128", "q4g128", "fp8")]
    for kernel in compile_sources(sources, variant).values():
        assert kernel.loop_spills == 0, kernel.function
        assert kernel.shared <= variant.shared_bytes


def _counted(kernel: Compiled) -> float:
    assert kernel.instructions_per_weight is not None
    return kernel.instructions_per_weight
