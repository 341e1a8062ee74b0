"""The CPU backend: TVM generates the kernels, gcc links them with the package's native runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmc.backends.base import Entry, Kernels, plan_head, state_numbers
from llmc.backends.buffers import Buffers
from llmc.backends.tvm.code import compile_specs
from llmc.backends.tvm.compile import find_compiler
from llmc.backends.tvm.each import each_tokens
from llmc.backends.tvm.lower import lower
from llmc.backends.tvm.lower_attention import entry_graph
from llmc.backends.tvm.plan import describe_entry, plan_entry
from llmc.ir.graph import Graph
from llmc.ir.target import Target
from llmc.ir.types import DType
from llmc.ir.verify import verify


class TvmBackend:
    """Kernels for the x86-64 variants of a target, and for sequences of `longest` tokens at most."""

    name = "tvm"
    entry_names = ("decode", "prefill", "verify")

    def __init__(self, target: Target, longest: int) -> None:
        find_compiler(target.machine)  # now, and not when everything else is done
        self.target = target
        self.longest = longest

    @property
    def versions(self) -> dict[str, str]:
        """What generated the code."""
        return {"apache-tvm": version("apache-tvm")}

    def lower(self, graph: Graph) -> Graph:
        """See `Backend`."""
        return lower(graph, self.longest)

    def plan(self, name: str, graph: Graph) -> Entry:
        """See `Backend`."""
        graph = entry_graph(name, graph, self.longest)
        verify(graph)
        return plan_entry(name, graph)

    def compile(self, entries: Sequence[Entry], scratch: Path) -> Kernels:
        """See `Backend`."""
        specs = [launch.spec for entry in entries for launch in entry.launches]
        return compile_specs(specs, self.target.cpu_variants, scratch)

    def describe(
        self, entries: Sequence[Entry], placed: Mapping[str, tuple[int, int]], step: Graph, block_size: int
    ) -> dict[str, dict[str, Any]]:
        """See `Backend`."""
        buffers = Buffers(placed, state_numbers(step))
        described = {entry.name: describe_entry(entry, buffers) for entry in entries}
        plan = {
            **plan_head(entries, step, block_size),
            "private_bytes": max(entry.private.peak for entry in entries),
            "each_tokens": min(each_tokens(entry.private) for entry in entries),
            "buffers": buffers.table,
            "kernels": buffers.kernels,
            "entries": described,
        }
        return {"plan.json": plan}


def make(target: Target, longest: int, compute: DType) -> TvmBackend:
    """See `choose.backend_for`. CPU kernels compute in f32."""
    assert compute is DType.F32
    return TvmBackend(target, longest)
