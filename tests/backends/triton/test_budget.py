"""What compiled kernels take of a chip: no register spilled in a loop, and no more instructions for a weight than
the chip can start while memory delivers it. Attention has its own: test_attention_compile.py."""

from __future__ import annotations

import pytest

from llmc.backends.triton.compile import Compiled, compile_sources
from llmc.backends.triton.kernels.linear import source
from llmc.backends.triton.ops import BlockLinear
from llmc.backends.triton.products import product_kernel
from llmc.backends.triton.source import KernelSource
from llmc.backends.triton.tiling import Tunings
from llmc.ir.errors import LlmcError
from llmc.ir.quant import FORMATS
from llmc.ir.target import GPU_VARIANTS
from llmc.ir.types import DType

pytestmark = pytest.mark.static

DELIVERED = 0.9
"""Of a datasheet's bandwidth: an H200 copies 4.3 TB/s of its 4.8."""

BF16 = DType.BF16

SHORT = {
    # Memory of 8 TB/s brings two weights where an H200's brings one, and the clock is the same. Up to 8 tokens fit;
    # with 16, pairs of x are put together in registers anew for each 16 rows: 0.4 instructions a weight.
    ("sm_100", "q4"): 3.1,
    ("sm_100", "q4g64"): 2.85,
    ("sm_100", "q4g128"): 2.7,
}
"""Known to be bound by instructions, with the most that they may take, of 1 or 16 tokens."""


def linear(format: str, rows: int, variant: str) -> KernelSource:
    """The projection of queries, keys and values of an 8B model."""
    op = BlockLinear(format, 6144, 4096, False, "none", False, None, BF16, BF16)
    call, tiling = product_kernel(op, BF16, BF16, rows, 0, GPU_VARIANTS[variant], Tunings())
    spec = call.spec(tiling)
    return source(spec, GPU_VARIANTS[variant])


@pytest.mark.parametrize("name", GPU_VARIANTS)
def test_products_of_few_tokens_are_bound_by_memory(name: str) -> None:
    variant = GPU_VARIANTS[name]
    plenty = name in ("sm_86", "sm_89")  # of instructions for each weight: their memory is slow
    formats = [f for f in (("none", "q4", "fp8") if plenty else ("none", *FORMATS)) if variant.has_fp8 or f != "fp8"]
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


@pytest.mark.parametrize("name", ["sm_80", "sm_86"])
def test_8_bit_floats_are_refused_where_the_chip_has_none(name: str) -> None:
    with pytest.raises(LlmcError, match=f"{name} has no 8-bit floats, which fp8 need.*sm_89.*q8"):
        linear("fp8", 1, name)


def test_large_tiles_keep_their_registers() -> None:
    variant = GPU_VARIANTS["sm_90"]
    sources = [linear(format, 2048, "sm_90") for format in ("none", "q8g128", "q4g128", "fp8")]
    for kernel in compile_sources(sources, variant).values():
        assert kernel.loop_spills == 0, kernel.function
        assert kernel.shared <= variant.shared_bytes


def _counted(kernel: Compiled) -> float:
    assert kernel.instructions_per_weight is not None
    return kernel.instructions_per_weight
