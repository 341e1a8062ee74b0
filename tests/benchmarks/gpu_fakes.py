"""A GPU for benchmarks that only its clock knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.gpu.measure import Ours
from benchmarks.gpu.rows import Row
from benchmarks.gpu.timing import Clock, Steps

MACHINE = {
    "gpu": "NVIDIA H200",
    "cache_bytes": 60_000_000,
    "nvidia_smi": {"driver_version": "580.1", "clocks.sm": "345 MHz", "clocks.max.sm": "1980 MHz"},
    "versions": {"python": "3.12.3", "torch": "2.11.0"},
}
CEILINGS = {"copy_bandwidth": 4e12, "read_bandwidth": 4.2e12, "matrix_rate": 800e12}
FACTS = {
    "kernels": 165,
    "graph_nodes": 167,
    "memory": {"weights": 1},
    "memory_planned": 17_000_000_000,
    "launcher": "native",
}
PARTS = ("process", "import", "load", "prefill", "total", "read_weights")


class FakeClock:
    """Time passes where fake steps let it pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def device(self, work: Callable[[], object]) -> float:
        before = self.now
        work()
        return self.now - before

    wall = device


class FakeSteps:
    """Steps of so many seconds each."""

    def __init__(self, clock: FakeClock, seconds: float, log: list[str], name: str) -> None:
        self.clock, self.seconds, self.log, self.name = clock, seconds, log, name

    def start(self, count: int) -> None:
        self.clock.now += self.seconds * count
        self.log.append(self.name)

    def take(self) -> None:
        self.start(1)

    def check(self) -> None:
        self.log.append("check")


class FakeLab:
    """Steps that take twice the time of their bytes; peers take three times. `broken` rows raise; see `measure.Lab`."""

    def __init__(self, broken: Mapping[str, Exception] = {}) -> None:
        self.now = FakeClock()
        self.clock: Clock = self.now
        self.broken = broken
        self.log: list[str] = []

    def ceilings(self) -> Mapping[str, Any]:
        self.log.append("ceilings")
        return CEILINGS

    def machine(self) -> Mapping[str, Any]:
        return MACHINE

    def peer(self, row: Row) -> tuple[Steps, Mapping[str, Any]]:
        self.log.append("peer")
        return FakeSteps(self.now, 12e-3, self.log, "theirs"), {"bytes": 16e9, "settings": {}}

    def ours(self, row: Row) -> tuple[Ours, Mapping[str, Any]]:
        self.log.append(row.name)
        if row.name in self.broken:
            raise self.broken[row.name]
        small = row.setup.model == "1b"
        seconds, moved = (1e-5, 20_000_000) if small else (8e-3, 16_000_000_000)
        return FakeSteps(self.now, seconds, self.log, "ours"), {**FACTS, "plan_bytes": moved}

    def first_token(self, row: Row) -> Mapping[str, Any]:
        return {"weights_bytes": 5e9, **{name: dict.fromkeys(PARTS, 1.0) for name in ("cached", "dropped")}}

    def release(self) -> None:
        self.log.append("release")

    def clocks(self) -> Mapping[str, str]:
        return {"clocks.sm": "1980 MHz"}
