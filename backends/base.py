"""What every backend produces: kernel specifications, and a plan of launches over buffers, as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llmc.ir.graph import Graph, StateInput
from llmc.ir.op import Value
from llmc.passes.plan_memory import MemoryPlan

SYMBOLS = ("tokens", "sequences", "max_blocks", "outputs")
"""The sizes of a step, in the order in which kernels find them in `dims`."""


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's whole identity: its kind and parameters. Equal specs are compiled once, whatever layer asks."""

    kind: str
    parameters: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(kind: str, **parameters: Any) -> KernelSpec:
        """A spec with its parameters in canonical order."""
        return KernelSpec(kind, tuple(sorted(parameters.items())))

    @property
    def symbol(self) -> str:
        """The C symbol: kind and a hash of all fields."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.kind}_{digest[:12]}"


@dataclass(frozen=True)
class Launch:
    """One kernel run over the values it reads and writes, in the order of its C arguments.

    `each`: in a step of few tokens every task runs it whole, into memory of its own, and no barrier follows.
    `flops` and `bytes` are (fixed, for each token, for each token of context) at batch 1: what the ledger sums. No
    sequence has more context than the `window`, if there is one.
    """

    spec: KernelSpec
    arguments: tuple[Value, ...]
    node: str
    flops: tuple[int, int, int]
    bytes: tuple[int, int, int]
    each: bool = False
    window: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class Entry:
    """A lowered entry point: bounds on its symbols, its launches in order, where their intermediate values lie.

    `memory` is the arena that all tasks share, `private` what each task has of its own.
    """

    name: str
    bounds: Mapping[str, tuple[int, int]]
    graph: Graph
    launches: Sequence[Launch]
    memory: MemoryPlan
    private: MemoryPlan

    @property
    def arguments(self) -> Iterator[Value]:
        """Every value that a launch reads or writes, in order."""
        return (value for launch in self.launches for value in launch.arguments)

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the intermediate values of the largest step, which one task's memory holds: as planned (`peak`),
        and if no two shared memory (`naive`)."""
        plans = (self.memory, self.private)
        return {"peak": sum(p.peak for p in plans), "naive": sum(p.naive for p in plans)}


@dataclass(frozen=True)
class Kernels:
    """Compiled code: files by name, seconds by kernel symbol (for the report, never for the package)."""

    files: Mapping[str, bytes]
    seconds: Mapping[str, float]
    variants: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


EntryT = TypeVar("EntryT", bound=Entry)


class Backend(Protocol[EntryT]):
    """Lowers a step graph to entries, and entries' kernels to code."""

    name: str

    @property
    def entry_names(self) -> Sequence[str]:
        """The entry points that its packages have, of `decode`, `prefill` and `verify`."""

    @property
    def versions(self) -> dict[str, str]:
        """What generated the code, and its version."""

    def lower(self, graph: Graph) -> Graph:
        """The graph in ops that have kernels, parameters packed; the pack program is its parameter-only part."""

    def plan(self, name: str, graph: Graph) -> EntryT:
        """The launches and buffers of a lowered, specialised graph."""

    def compile(self, entries: Sequence[EntryT], scratch: Path) -> Kernels:
        """Code for every distinct kernel of the entries."""

    def describe(
        self, entries: Sequence[EntryT], placed: Mapping[str, tuple[int, int]], step: Graph, block_size: int
    ) -> dict[str, dict[str, Any]]:
        """The plans as the package has them, by file name. `placed`: (offset, bytes) of parameters by name."""


def plan_head(entries: Sequence[Entry], step: Graph, block_size: int) -> dict[str, Any]:
    """What the plans of all backends begin with."""
    states = [v.op.state for v in step.states if isinstance(v.op, StateInput)]
    windows = [group.window for group in step.layer_groups]
    limits = {n: max(e.bounds[n][1] for e in entries if n in e.bounds) for n in ("tokens", "sequences", "outputs")}
    return {
        "block_size": block_size,
        "arena_bytes": max(entry.memory.peak for entry in entries),
        "symbols": list(SYMBOLS),
        "limits": limits,
        "groups": [{"name": group.name, "window": group.window} for group in step.layer_groups],
        "states": [
            {
                "name": s.name,
                "kind": s.kind,
                "dtype": s.dtype.value,
                "block_shape": list(s.shape[1:]),
                "group": windows.index(s.window),
            }
            for s in states
        ],
    }


def state_numbers(step: Graph) -> dict[str, int]:
    """The states' places in a plan, by name."""
    return {v.op.state.name: i for i, v in enumerate(step.states) if isinstance(v.op, StateInput)}
