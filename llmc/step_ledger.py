"""Where the time of a decode step goes: every kind of launch with its bytes and time, beside the bandwidth."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.bench import decode_steps, filled_sequences, open_for
from llmc.ir.errors import LlmcError
from llmc.runtime.timings import Profile, ProfileRow

_NUMBER = re.compile(r"\.\d+(?=[.:])")


@dataclass(frozen=True)
class LedgerRow:
    """All launches of one kind in one step; `node` is the graph's, with `*` for the number of a layer."""

    node: str
    kernels: tuple[str, ...]
    launches: int
    bytes: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class StepLedger:
    """Rows of one decode step, the slowest first, and what they are held against.

    `step_seconds`: a step without the clock in it; `clocked_seconds`: one with it, read at every launch.
    `read_bandwidth`: bytes per second of a plain read of the weights. All are of the round that took the median time.
    """

    package: str
    threads: int
    batch: int
    depth: int
    step_seconds: float
    clocked_seconds: float
    read_bandwidth: float
    rows: tuple[LedgerRow, ...]

    @property
    def sum_seconds(self) -> float:
        """What the launches take together; the rest of a step lies outside them."""
        return sum(row.seconds for row in self.rows)

    @property
    def coverage(self) -> float:
        """The sum over the step without the clock: 1 when the ledger explains the whole step."""
        return self.sum_seconds / self.step_seconds

    def as_json(self) -> dict[str, Any]:
        """All figures as one JSON object."""
        rows = [
            {**asdict(row), "bandwidth": row.bandwidth, "share_of_bandwidth": row.bandwidth / self.read_bandwidth}
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows, "sum_seconds": self.sum_seconds, "coverage": self.coverage}

    def __str__(self) -> str:
        width = max(len(row.node) for row in self.rows)
        moved = sum(row.bytes for row in self.rows)
        rows = [(row.node, row.launches, row.bytes, row.seconds) for row in self.rows]
        rows.append(("sum", sum(row.launches for row in self.rows), moved, self.sum_seconds))
        return "\n".join(
            (
                f"{self.package}, {self.threads} threads, batch {self.batch}, one decode step at depth {self.depth}",
                f"{'':{width}}  launches        MB        µs  of sum     GB/s  of a plain read",
                *(self._line(width, *row) for row in rows),
                f"a step takes {self.step_seconds * 1e6:.1f} µs, with the clock {self.clocked_seconds * 1e6:.1f} µs:",
                f"the sum is {self.coverage:.1%} of it; a plain read gives {self.read_bandwidth / 1e9:.1f} GB/s",
            )
        )

    def _line(self, width: int, node: str, launches: int, moved: int, seconds: float) -> str:
        speed = moved / seconds if seconds else 0.0
        return (
            f"{node:{width}}  {launches:8}  {moved / 1e6:8.2f}  {seconds * 1e6:8.1f}"
            f"  {seconds / self.sum_seconds:6.1%}  {speed / 1e9:7.1f}  {speed / self.read_bandwidth:15.0%}"
        )


def step_ledger(folder: Path, *, steps: int, depth: int, batch: int, repeat: int, threads: int | None) -> StepLedger:
    """Profile decode: `repeat` rounds of `steps` steps without and with the clock, in turns, after `depth` tokens.

    Raises `LlmcError` when the context or the batch is larger than the package's, or the rounds longer than its layers
    with a window can be rolled back.
    """
    model = open_for(folder, depth + steps, batch, threads)
    engine = model.sequence().engine
    executor = engine.executor
    if steps > engine.max_tokens and any(group.window for group in executor.groups):
        raise LlmcError(
            f"{steps} steps cannot be repeated: layers with a sliding window are rolled back by {engine.max_tokens}"
            " tokens at most; measure so many steps or fewer"
        )
    tokens = np.random.default_rng(0).integers(0, executor.vocab_size, depth + steps).tolist()
    sequences = filled_sequences(model, tokens[:depth], batch)

    def run(profile: Profile | None = None) -> float:
        seconds = decode_steps(sequences, tokens[depth:], profile) / steps
        for sequence in sequences:
            sequence.truncate(depth)
        return seconds

    run()
    rounds = []
    for _ in range(repeat):
        before, profile = executor.library.read_bandwidth(executor.weights), Profile()
        plain, clocked = run(), run(profile)
        after = executor.library.read_bandwidth(executor.weights)
        rounds.append((plain, clocked, (before + after) / 2, group_rows(profile.rows())))
    median = statistics.median_low(plain for plain, *_ in rounds)
    plain, clocked, bandwidth, rows = next(entry for entry in rounds if entry[0] == median)
    ledger = StepLedger(
        model.info["name"], executor.library.threads, batch, depth + steps // 2, plain, clocked, bandwidth, rows
    )
    model.close()
    return ledger


def group_rows(rows: Iterable[ProfileRow]) -> tuple[LedgerRow, ...]:
    """Launches of one kind together, for one step, the slowest first."""
    groups: dict[str, list[ProfileRow]] = {}
    for row in rows:
        groups.setdefault(_NUMBER.sub(".*", row.node), []).append(row)
    made = [
        LedgerRow(
            node=node,
            kernels=tuple(sorted({row.kernel for row in members})),
            launches=len(members),
            bytes=sum(row.bytes // row.calls for row in members),
            seconds=sum(row.seconds / row.calls for row in members),
        )
        for node, members in groups.items()
    ]
    return tuple(sorted(made, key=lambda row: -row.seconds))
