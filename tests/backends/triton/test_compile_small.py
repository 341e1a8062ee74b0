"""Every kind of small kernel compiled for every architecture: no spills, registers for all its threads."""

from __future__ import annotations

import pytest

from llmc.backends.base import KernelSpec
from llmc.backends.triton.compile import compile_sources
from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.kernels.elementwise import elementwise_spec
from llmc.backends.triton.kernels.embedding import embedding_spec
from llmc.backends.triton.kernels.norm import norm_spec
from llmc.backends.triton.kernels.rope_append import append_spec
from llmc.backends.triton.kernels.rotary_table import dynamic_rotary_table_spec, rotary_table_spec
from llmc.backends.triton.kernels.select_token import select_token_spec
from llmc.ir.target import GPU_VARIANTS
from llmc.ir.types import DType

pytestmark = pytest.mark.static

SPECS: tuple[KernelSpec, ...] = (
    embedding_spec(1000, 4096, DType.BF16, blocks=False),
    embedding_spec(1000, 4096, DType.F16, blocks=True),
    *(embedding_spec(1000, 4096, DType.I32, blocks=True, format=format) for format in ("q4", "q8g128", "fp8")),
    append_spec(32, 8, 128, 128, "half", "f32", "bf16", "i8", 16),
    append_spec(64, 8, 128, 128, "half", "f32", "bf16", "bf16", 16, "rms", 1e-6),
    append_spec(40, 40, 128, 128, "half", "f32", "bf16", "bf16", 16, "rms", 1e-6, whole=True),
    append_spec(40, 8, 80, 40, "interleaved", "f32", "f16", "i8", 16, "layer", 1e-5, whole=True),
    norm_spec(norm="rms", hidden=4096, eps=1e-5, residual="after", out_dtype="bf16", rows_dim=0),
    norm_spec(norm="layer", hidden=16384, eps=1e-5, residual="before", out_dtype="f16", rows_dim=0),
    rotary_table_spec(rotary_dim=128, scaling=1.0, rows_dim=0),
    dynamic_rotary_table_spec(rotary_dim=96, base=1e4, factor=2.0, max_positions=4096, scaling=1.0, rows_dim=0),
    elementwise_spec(operation="add", width=4096, x_dtype="f32", y_dtype="bf16", out_dtype="f32", rows_dim=0),
    elementwise_spec(operation="gelu_erf", width=11008, x_dtype="f32", out_dtype="bf16", rows_dim=0),
    elementwise_spec(operation="gelu_tanh", width=11008, x_dtype="bf16", out_dtype="bf16", rows_dim=0),
    elementwise_spec(operation="tanh", width=256000, x_dtype="f32", out_dtype="f32", rows_dim=3),
    select_token_spec(vocab=128256),
)


@pytest.mark.parametrize("name", GPU_VARIANTS)
def test_every_kind_is_compiled(name: str) -> None:
    variant = GPU_VARIANTS[name]
    sources = [source_of(spec, variant) for spec in SPECS]
    compiled = compile_sources(sources, variant, processes=1)
    for source in sources:
        kernel = compiled[source.name]
        assert kernel.spills == 0, source.name
        assert kernel.registers <= 65536 // (32 * source.num_warps)
        assert kernel.arguments == len(source.arguments)
        assert kernel.dependent == (variant.capability >= (9, 0))
        if "rotary" in source.name:  # pi / 2 with all its digits, which the interpreter would have in any case
            assert b"BFF921FB54400000" in kernel.ptx
        assert (b"griddepcontrol.wait" in kernel.ptx) == kernel.dependent
