"""The GPU backend: Triton kernels compiled to cubins for each architecture of a target, on any machine."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmc.backends.base import Kernels, plan_head, state_numbers
from llmc.backends.buffers import Buffers
from llmc.backends.package import LAUNCHER, to_json
from llmc.backends.triton.compile import Compiled, compile_sources, find_triton
from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.launcher import build_launcher
from llmc.backends.triton.lower import entry_graph, lower
from llmc.backends.triton.plan import GpuEntry, describe_entry, plan_entry
from llmc.backends.triton.tiling import Tunings
from llmc.ir.graph import Graph
from llmc.ir.target import GpuVariant, Target
from llmc.ir.types import DType
from llmc.ir.verify import verify

_DATE = (1980, 1, 1, 0, 0, 0)
"""Of files in archives: a package has no times in it."""


class TritonBackend:
    """Kernels for the architectures of a target and sequences of `longest` tokens at most, whose activations enter
    products in `compute`. `tunings`: measured tilings."""

    name = "triton"
    entry_names: Sequence[str] = ("decode", "prefill")

    def __init__(self, target: Target, longest: int, compute: DType, tunings: Tunings | None = None) -> None:
        self._version = find_triton()  # now, and not when everything else is done
        self.variants = target.gpu_variants
        self.longest = longest
        self.compute = compute
        self.tunings = tunings or Tunings()

    @property
    def versions(self) -> dict[str, str]:
        """See `Backend`."""
        return {"triton": self._version}

    def lower(self, graph: Graph) -> Graph:
        """See `Backend`."""
        return lower(graph, self.compute)

    def plan(self, name: str, graph: Graph) -> GpuEntry:
        """See `Backend`."""
        graph = entry_graph(name, graph)
        verify(graph)
        return plan_entry(name, graph, self.variants, self.longest, self.tunings)

    def compile(self, entries: Sequence[GpuEntry], scratch: Path) -> Kernels:
        """See `Backend`. One archive of code for each architecture, and what its kernels take of the chip."""
        files: dict[str, bytes] = {}
        seconds: dict[str, float] = {}
        described = []
        for variant in self.variants:
            buckets = [bucket for entry in entries for bucket in entry.buckets[variant.name]]
            specs = {launch.spec.symbol: launch.spec for bucket in buckets for launch in bucket.launches}
            compiled = compile_sources([source_of(spec, variant) for spec in specs.values()], variant)
            seconds |= {name: max(seconds.get(name, 0.0), kernel.seconds) for name, kernel in compiled.items()}
            manifest = _described(variant)
            files[manifest["kernels"]] = _archive(compiled, with_ptx=not variant.exact)
            files[manifest["resources"]] = to_json({name: k.as_json() for name, k in compiled.items()})
            described.append(manifest)
        launcher = build_launcher(scratch)
        if launcher is not None:
            files[LAUNCHER] = launcher
        return Kernels(files, seconds, described)

    def describe(
        self, entries: Sequence[GpuEntry], placed: Mapping[str, tuple[int, int]], step: Graph, block_size: int
    ) -> dict[str, dict[str, Any]]:
        """See `Backend`. One plan for each architecture."""
        plans = {}
        for variant in self.variants:
            buffers = Buffers(placed, state_numbers(step))
            described = {entry.name: describe_entry(entry, variant.name, buffers) for entry in entries}
            buckets = [bucket for entry in entries for bucket in entry.buckets[variant.name]]
            launches = [launch for bucket in buckets for launch in bucket.launches]
            plans[_described(variant)["plan"]] = {
                **plan_head(entries, step, block_size),
                "workspace_bytes": max((launch.workspace for launch in launches), default=0),
                "tickets": max((launch.tickets for launch in launches), default=0),
                "buffers": buffers.table,
                "kernels": buffers.kernels,
                "entries": described,
            }
        return plans


def _described(variant: GpuVariant) -> dict[str, Any]:
    """The architecture as the manifest has it."""
    return {
        "name": variant.name,
        "capability": list(variant.capability),
        "exact": variant.exact,
        "kernels": f"kernels-{variant.name}.zip",
        "resources": f"kernels-{variant.name}.json",
        "plan": f"plan-{variant.name}.json",
        "weights": "weights.bin",
        "requires": [],
    }


def _archive(compiled: Mapping[str, Compiled], with_ptx: bool) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, kernel in compiled.items():
            contents = {"cubin": kernel.cubin} | ({"ptx": kernel.ptx} if with_ptx else {})
            for kind, content in contents.items():
                archive.writestr(zipfile.ZipInfo(f"{name}.{kind}", _DATE), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def make(target: Target, longest: int, compute: DType, tunings: Tunings | None = None) -> TritonBackend:
    """See `choose.backend_for`."""
    return TritonBackend(target, longest, compute, tunings)
