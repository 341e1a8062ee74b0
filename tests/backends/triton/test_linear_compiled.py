"""Every beginning and end of the matrix kernel is compiled for every architecture, from what lowering asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmc.backends.triton import sass
from llmc.backends.triton.compile import compile_sources
from llmc.backends.triton.kernels.linear import linear_spec, source
from llmc.backends.triton.source import KernelSource
from llmc.backends.triton.tiling import Tiling
from llmc.ir.quant import FORMATS
from llmc.ir.target import GPU_VARIANTS, GpuVariant
from llmc.ir.types import DType

pytestmark = pytest.mark.static

F32, F16, BF16 = DType.F32, DType.F16, DType.BF16
APPEND: dict[str, Any] = {
    "epilogue": "append",
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "rotary_dim": 32,
    "block_size": 16,
}


def kernel(variant: GpuVariant, format: str, compute: DType, tiling: Tiling, **options: Any) -> KernelSource:
    x = F32 if "norm_eps" in options else compute
    return source(linear_spec(512, 640, 8, 0, format, compute, x, compute, tiling, **options), variant)


@pytest.mark.parametrize("name", GPU_VARIANTS)
def test_every_beginning_and_end(name: str) -> None:
    variant = GPU_VARIANTS[name]
    warps = 2 if name == "sm_100" else 4
    small = Tiling(128, 8, 128, 8, 3, warps)
    state = "f8e4m3" if variant.has_fp8 else "f16"
    sources = [
        kernel(variant, "none", F32, Tiling(64, 8, 64, 8, 2, 4), norm_eps=1e-5, activation="gelu_erf", soft_cap=30.0),
        kernel(variant, "none", F16, Tiling(64, 16, 64, 8, 3, 4), bias=True, activation="gelu_tanh"),
        kernel(variant, "q4", BF16, small, norm_eps=1e-5, epilogue="gated", activation="silu", out_dtype="bf16"),
        kernel(variant, "q8g128", F16, small, epilogue="residual", activation="relu", factor=0.2),
        kernel(variant, "q4g64", BF16, small, bias=True, state_dtype=state, out_dtype="bf16", **APPEND),
        kernel(variant, "none", BF16, small, norm_eps=1e-5, layout="interleaved", state_dtype="bf16", **APPEND),
        kernel(variant, "q4g128", F32, Tiling(64, 8, 128, 8, 2, 4), scale_weights=False),
    ]
    for compiled in compile_sources(sources, variant).values():
        assert compiled.loop_spills == 0 and compiled.shared <= variant.shared_bytes, compiled.function
        assert compiled.instructions_per_weight is not None


@pytest.mark.parametrize(
    ("name", "multiplies"), [("sm_80", "HMMA"), ("sm_89", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "HMMA")]
)
def test_codes_are_decoded_in_registers(name: str, multiplies: str, tmp_path: Path) -> None:
    """No decoded weight passes through shared memory, everything is loaded ahead, and 16 bytes at a time."""
    variant = GPU_VARIANTS[name]
    tiling = Tiling(128, 8, 128, 8, 4, 2 if name == "sm_100" else 4)
    sources = {f: kernel(variant, f, BF16, tiling) for f in FORMATS if f != "fp8" or variant.has_fp8}
    compiled = compile_sources(list(sources.values()), variant)
    for format, made in sources.items():
        cubin = tmp_path / f"{format}.cubin"
        cubin.write_bytes(compiled[made.name].cubin)
        loop = sass.main_loop(sass.disassemble(cubin))
        families = {i.family for i in loop}
        assert multiplies in families and not {"LDG", "STS", "STSM", "LDL", "STL"} & families, format
        words = 128 * 128 * FORMATS[format].bits // 32
        assert sum("LDS.128" in i.name for i in loop) >= words // 4 // (32 * made.num_warps), format
        assert any("LDGSTS" in i.name and "128" in i.name for i in loop), format
