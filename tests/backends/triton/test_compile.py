from __future__ import annotations

from dataclasses import replace

import pytest

from llmc.backends.base import KernelSpec
from llmc.backends.triton.compile import compile_sources, find_triton
from llmc.backends.triton.cubin import kernel_parameters
from llmc.backends.triton.kernels import source_of
from llmc.ir.errors import LlmcError
from llmc.ir.target import GPU_VARIANTS

pytestmark = pytest.mark.static


@pytest.mark.parametrize("name", GPU_VARIANTS)
def test_a_kernel_is_compiled_without_a_gpu(name: str) -> None:
    variant = GPU_VARIANTS[name]
    source = source_of(KernelSpec.of("gather_rows", width=2048, dtype="f32"), variant)
    (compiled,) = compile_sources([source], variant).values()
    assert compiled.cubin.startswith(b"\x7fELF")
    assert f".target {name}{'a' if variant.exact else ''}\n".encode() in compiled.ptx
    assert kernel_parameters(compiled.cubin)[compiled.function] == [(8 * i, 8) for i in range(6)]
    assert compiled.arguments == 4 and compiled.threads == 128 and compiled.spills == 0
    assert 0 < compiled.registers < 64 and compiled.instructions > 10
    assert compiled.dependent == (variant.capability >= (9, 0))


def test_a_kernel_that_does_not_compile_is_named_or_left_out() -> None:
    variant = GPU_VARIANTS["sm_90"]
    good = source_of(KernelSpec.of("gather_rows", width=2048, dtype="f32"), variant)
    broken = replace(good, name="broken", text=good.text.replace(good.name, "broken").replace("tl.load", "tl.lode"))
    with pytest.raises(LlmcError, match=r"(?s)cannot compile broken for sm_90: .*lode"):
        compile_sources([broken], variant)
    failures: dict[str, str] = {}
    assert compile_sources([broken, good], variant, failures=failures).keys() == {good.name}
    assert failures.keys() == {"broken"} and "lode" in failures["broken"]


def test_a_compiler_that_ends_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = GPU_VARIANTS["sm_90"]
    source = source_of(KernelSpec.of("gather_rows", width=2048, dtype="f32"), variant)
    sources = [replace(source, name=f"{source.name}_{i}") for i in range(4)]
    monkeypatch.setattr("llmc.backends.triton.compile.sys.executable", "/bin/false")
    with pytest.raises(LlmcError, match=r"^the compiler of gather_rows_\w+ ended without an answer: it said nothing$"):
        compile_sources(sources, variant, processes=2)


def test_more_processes_than_kernels_end() -> None:
    """Workers that find nothing left to do, however they are timed."""
    variant = GPU_VARIANTS["sm_90"]
    sources = [
        source_of(KernelSpec.of("gather_rows", width=width, dtype="f32"), variant)
        for width in (64, 128, 256, 512, 1024)
    ]
    assert compile_sources(sources, variant, processes=4).keys() == {source.name for source in sources}


def test_without_triton_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LlmcError, match=r"^compiling for a GPU needs Triton .*: pip install 'llmc\[gpu\]'$"):
        find_triton()
