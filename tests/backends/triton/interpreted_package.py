"""A real CUDA package whose kernels are not compiled but interpreted: all else of compiling and running is as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmc.backends.triton import backend
from llmc.backends.triton.compile import Compiled
from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.source import KernelSource
from llmc.driver import compile_model
from llmc.options import CompileOptions, Limits
from llmc.runtime.cuda_executor import CudaExecutor
from llmc.runtime.cuda_kernels import read_kernels
from llmc.runtime.cuda_plan import read_cuda_plan
from llmc.runtime.document import read_document
from llmc.runtime.manifest import read_manifest
from llmc.runtime.model import Model
from tests.backends.triton.interpreted_device import InterpretedDevice

SMALL = Limits(tokens=32, sequences=4, outputs=4)
"""Few programs: the interpreter takes milliseconds for each."""


def compile_interpreted(
    monkeypatch: pytest.MonkeyPatch, model: Path, output: Path, **options: Any
) -> dict[str, KernelSource]:
    """Compile a model for sm_90 without its cubins; gives the kernels for the interpreter, by symbol."""
    sources: dict[str, KernelSource] = {}

    def remember(spec: Any, variant: Any) -> KernelSource:
        sources[spec.symbol] = source_of(spec, None)
        return source_of(spec, variant)

    def pretend(given: list[KernelSource], variant: Any) -> dict[str, Compiled]:
        return {s.name: _pretended(s) for s in given}

    with monkeypatch.context() as patch:
        patch.setattr(backend, "source_of", remember)
        patch.setattr(backend, "compile_sources", pretend)
        compile_model(model, output, CompileOptions(**{"target": "cuda:sm_90", "limits": SMALL, **options}))
    return sources


def load_interpreted(folder: Path, sources: dict[str, KernelSource]) -> tuple[Model, InterpretedDevice]:
    """The package's model on an interpreted device."""
    manifest = read_manifest(folder)
    (variant,) = manifest.variants
    assert variant.resources is not None
    kernels = read_kernels(folder / variant.resources)
    size = manifest.files[variant.weights].bytes
    plan = read_cuda_plan(folder / variant.plan, size, kernels)
    device = InterpretedDevice(sources)
    facts = manifest.model
    blocks = -(-facts.max_sequence_length // plan.block_size)
    executor = CudaExecutor(plan, kernels, device, folder / variant.weights, size, facts.vocab_size, blocks)
    checks = read_document(folder / "checks.json")
    return Model(executor, facts, checks=checks, info=dict(manifest.raw)), device


def _pretended(source: KernelSource) -> Compiled:
    count = len(source.arguments)
    return Compiled(b"\x7fELF", b"", source.name, 32 * source.num_warps, 0, count, True, 1, 0, 0, 1, None, 0.0)
