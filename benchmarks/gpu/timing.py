"""Systems in turns under one clock: blocks of steps, one system after another, round after round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Protocol

from benchmarks.measures import Spread

WARMING = 4
"""Steps before the clock: the first records graphs and touches all memory."""
BLOCK_SECONDS = 0.02
"""About what a block takes: long beside the start of its first step, short beside drifts of the clocks."""
LEAST_ROUNDS, MOST_ROUNDS = 8, 100
WALL_STEPS = 20


class Steps(Protocol):
    """Something that can take the same step again and again."""

    def start(self, count: int) -> None:
        """Start so many steps on the device, one after another, without waiting for them."""


class Clock(Protocol):
    """Times what is started on a device, in seconds."""

    def device(self, work: Callable[[], object]) -> float:
        """From event to event, around what `work` starts."""

    def wall(self, work: Callable[[], object]) -> float:
        """By the host's clock, from before `work` until all that it started is done."""


def take_turns(clock: Clock, systems: Mapping[str, Steps], seconds: float) -> dict[str, list[float]]:
    """Seconds of one step by system, one figure for each round; the order of systems is turned round each time.

    `seconds`: about how long all rounds of all systems take together, warming up apart.
    """
    steps: dict[str, int] = {}
    estimate = 0.0
    for name, system in systems.items():
        clock.wall(lambda system=system: system.start(WARMING))  # type: ignore[misc]
        one = clock.device(lambda system=system: system.start(WARMING)) / WARMING  # type: ignore[misc]
        steps[name] = max(1, math.ceil(BLOCK_SECONDS / max(one, 1e-6)))
        estimate += steps[name] * one
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(seconds / max(estimate, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in systems}
    for i in range(rounds):
        for name in list(systems)[:: 1 if i % 2 == 0 else -1]:
            system, count = systems[name], steps[name]
            block = clock.device(lambda system=system, count=count: system.start(count))  # type: ignore[misc]
            found[name].append(block / count)
    return found


def wall_step(clock: Clock, system: Steps) -> float:
    """Median seconds of a step that the host waits for."""
    return Spread.of(clock.wall(lambda: system.start(1)) for _ in range(WALL_STEPS)).median


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles, in milliseconds."""
    return {name: value * 1e3 for name, value in asdict(Spread.of(seconds)).items()}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """How many times as fast ours is, from pairs of the same round: median and quartiles."""
    return asdict(Spread.of(b / a for a, b in zip(ours, theirs, strict=True)))
