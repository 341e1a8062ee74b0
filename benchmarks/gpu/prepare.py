"""Packages for `run`, compiled on a machine that has the compiler: kernels, plan, manifest, launcher, no weights."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import llmc.backends.triton.backend as triton_backend
from benchmarks.gpu.rows import LONGEST, Row, Setup, setups
from llmc.backends.triton.compile import Compiled, compile_sources
from llmc.backends.triton.source import KernelSource
from llmc.driver import compile_model
from llmc.ir.target import GpuVariant
from llmc.options import CompileOptions

TARGET = "cuda:sm_90"

Compile = Callable[[Sequence[KernelSource], GpuVariant], dict[str, Compiled]]


def prepare(
    folder: Path,
    rows: Sequence[Row],
    say: Callable[[str], None],
    missing: bool = False,
    compiler: Compile = compile_sources,
) -> None:
    """Compile what the rows need into folders under `folder`; what is there is compiled anew, unless `missing`.

    Kernels that several packages share are compiled once: a package takes a minute or so otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remembering = Remembering(compiler)
    with patch.object(triton_backend, "compile_sources", remembering):
        for setup in setups(rows):
            if missing and (folder / setup.name / "manifest.json").exists():
                continue
            start = time.perf_counter()
            compile_setup(setup, folder)
            size = sum(p.stat().st_size for p in (folder / setup.name).rglob("*") if p.is_file())
            seconds = time.perf_counter() - start
            say(f"{setup.name}: {size / 1e6:.1f} MB in {seconds:.0f} s, {remembering.compiled} kernels compiled so far")


def compile_setup(setup: Setup, folder: Path) -> None:
    """One package, without what only matters to users: its report, its graphs' text."""
    options = CompileOptions(
        target=TARGET,
        quant=setup.quant,
        kv_quant=None if setup.cache == "bf16" else setup.cache,
        max_sequence_length=LONGEST,
        random_weights=True,
        force=True,
        weights=False,
        checks=0,
    )
    output = folder / setup.name
    report = compile_model(setup.config, output, options)
    shutil.rmtree(report.package.with_name(f"{report.package.name}.report"), ignore_errors=True)
    drop_texts(output)


def drop_texts(package: Path) -> None:
    """Take the text of graphs out of a package: `run` has no use for it. Large constants stay, beside it."""
    path = package / "manifest.json"
    manifest = json.loads(path.read_text())
    for file in list(manifest["files"]):
        if file.startswith("graph/") and file.endswith(".ir"):
            (package / file).unlink()
            del manifest["files"][file]
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


class Remembering:
    """A compiler of kernels that compiles no kernel twice; `compiled` counts them."""

    def __init__(self, compiler: Compile) -> None:
        self._compiler = compiler
        self._known: dict[tuple[KernelSource, str], Compiled] = {}

    @property
    def compiled(self) -> int:
        """Kernels so far."""
        return len(self._known)

    def __call__(self, sources: Sequence[KernelSource], variant: GpuVariant) -> dict[str, Compiled]:
        new = [source for source in sources if (source, variant.name) not in self._known]
        made = self._compiler(new, variant)
        self._known.update({(source, variant.name): made[source.name] for source in new})
        return {s.name: self._known[s, variant.name] for s in sorted(sources, key=lambda s: s.name)}
