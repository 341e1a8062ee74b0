"""One row measured: ours alone or in turns with a peer, beside the bound that the measured ceilings give."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from benchmarks.gpu.bounds import Shape, bound, row_bytes, row_flops
from benchmarks.gpu.rows import Row
from benchmarks.gpu.timing import Clock, Steps, milliseconds, ratio, take_turns, wall_step
from benchmarks.measures import Spread

OURS = "llmc"
SECONDS = 1.5
"""For all rounds of a row."""
SECONDS_BESIDE = 6.0
"""The same with a peer."""


class Ours(Steps, Protocol):
    """A package's step; see `package.PackageSteps`."""

    def take(self) -> None:
        """One step, waited for, as a user's program takes it."""

    def check(self) -> None:
        """Raise `ValueError` where a step's result cannot be right."""


class Lab(Protocol):
    """Where rows are measured: the GPU with torch, or a fake in tests."""

    clock: Clock

    def ceilings(self) -> Mapping[str, Any]:
        """`copy_bandwidth`, `read_bandwidth` and `matrix_rate`, measured."""

    def machine(self) -> Mapping[str, Any]:
        """What is measured on."""

    def peer(self, row: Row) -> tuple[Steps, Mapping[str, Any]]:
        """The row's peer, warm, and what is known of it: `bytes` that its step reads, settings."""

    def ours(self, row: Row) -> tuple[Ours, Mapping[str, Any]]:
        """The row's package in its step, and `OpenPackage.facts`."""

    def first_token(self, row: Row) -> Mapping[str, Any]:
        """Seconds of a new process; see `first_token.measure`."""

    def release(self) -> None:
        """Give up what the last row left on the device, except a package that the next may need."""

    def clocks(self) -> Mapping[str, str]:
        """The device's clocks and temperature at this moment."""


def measure(row: Row, lab: Lab, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives, in the form of results: times in milliseconds with quartiles. `machine` holds the ceilings."""
    head = {
        "row": row.name,
        "kind": row.kind,
        "model": row.setup.model,
        "weights": row.setup.weights,
        "cache": row.setup.cache,
        "batch": row.batch,
        "context": row.context,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if row.kind == "first-token":
        return {**head, "first_token": dict(lab.first_token(row))}
    # The peer first: our cache takes what memory is left.
    systems: dict[str, Steps] = {}
    peer_facts: Mapping[str, Any] = {}
    if row.peer is not None:
        systems[row.peer], peer_facts = lab.peer(row)
    ours, facts = lab.ours(row)
    ours.check()
    systems[OURS] = ours
    found = take_turns(lab.clock, systems, SECONDS if row.peer is None else SECONDS_BESIDE)
    result = {**head, **_ours(row, found[OURS], facts, machine)}
    result["host_milliseconds"] = 1e3 * Spread.of(lab.clock.wall(ours.take) for _ in range(20)).median
    result["clocks"] = dict(lab.clocks())
    if row.peer is not None:
        result["peer"] = {
            "name": row.peer,
            **peer_facts,
            "milliseconds": milliseconds(found[row.peer]),
            "host_milliseconds": 1e3 * wall_step(lab.clock, systems[row.peer]),
            "ratio": ratio(found[OURS], found[row.peer]),
        }
        moved = peer_facts["bytes"] / machine["copy_bandwidth"]
        result["peer"]["share"] = moved / Spread.of(found[row.peer]).median
    return result


def _ours(row: Row, seconds: list[float], facts: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    shape = Shape.read(row.setup.config)
    flops, step = row_flops(row, shape), Spread.of(seconds).median
    limit = bound(facts["plan_bytes"], flops, machine)
    return {
        "milliseconds": milliseconds(seconds),
        "rounds": len(seconds),
        "tokens_per_second": row.tokens / step,
        "bytes": facts["plan_bytes"],
        "shape_bytes": round(row_bytes(row, shape)),
        "flops": round(flops),
        "bound_milliseconds": limit * 1e3,
        "bound_by": "memory" if limit * machine["copy_bandwidth"] <= facts["plan_bytes"] * (1 + 1e-9) else "arithmetic",
        "share": limit / step,
        "matrix_share": flops / step / machine["matrix_rate"],
        "fits_cache": facts["plan_bytes"] < machine.get("cache_bytes", 0),
        **{name: facts[name] for name in ("kernels", "graph_nodes", "memory", "memory_planned", "launcher")},
    }
