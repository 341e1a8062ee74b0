"""The CPU backend: TVM generates the kernels, gcc links them with the package's native runtime."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from llmc.backends.base import Entry, Kernels
from llmc.backends.tvm.code import compile_specs
from llmc.backends.tvm.compile import find_compiler
from llmc.backends.tvm.lower import lower
from llmc.backends.tvm.lower_attention import entry_graph
from llmc.backends.tvm.plan import plan_entry
from llmc.ir.graph import Graph
from llmc.ir.target import Target
from llmc.ir.verify import verify


class TvmBackend:
    """Kernels for the x86-64 variants of a target, and for sequences of `longest` tokens at most."""

    name = "tvm"

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
