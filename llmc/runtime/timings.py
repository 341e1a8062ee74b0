"""Where the time of a generation went: prefill, decode, and (when asked) every launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TimedLaunch(Protocol):
    """A launch with its costs; `plan.Launch` and `cuda_plan.CudaLaunch` are such."""

    @property
    def kernel(self) -> int:
        """The number of its kernel."""

    @property
    def node(self) -> str:
        """The node of the graph that it computes."""

    @property
    def flops(self) -> tuple[int, int, int]:
        """Operations: fixed, for each token, for each token of context."""

    @property
    def bytes(self) -> tuple[int, int, int]:
        """Bytes moved, likewise."""

    @property
    def window(self) -> int:
        """The most tokens of context that count for a sequence; 0: all."""


class TimedEntry(Protocol):
    """Launches that are always run together: an entry point, or its launches for one size of step."""

    @property
    def name(self) -> str:
        """The entry point."""

    @property
    def launches(self) -> Sequence[TimedLaunch]:
        """In order."""


class TimedBatch(Protocol):
    """What a step takes; `batch.Batch` is one."""

    @property
    def positions(self) -> NDArray[np.int32]:
        """The new tokens' positions."""

    @property
    def query_start(self) -> NDArray[np.int32]:
        """Where each sequence's tokens begin, and where the last end."""


@dataclass
class _Steps:
    """Steps of one entry point, summed; `context` before their tokens, by the window in which it counts."""

    entry: TimedEntry
    kernels: tuple[str, ...]
    nanoseconds: NDArray[np.uint64]
    calls: int = 0
    tokens: int = 0
    context: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class ProfileRow:
    """One node of the graph in one entry point, summed over `calls` steps; `flops` and `bytes` are estimated totals."""

    entry: str
    node: str
    kernel: str
    calls: int
    seconds: float
    flops: int
    bytes: int


class Profile:
    """Collects nanoseconds for each launch over steps."""

    def __init__(self) -> None:
        # By identity: to hash an entry is to hash all its launches.
        self._entries: dict[int, _Steps] = {}

    def add(
        self, entry: TimedEntry, kernels: tuple[str, ...], nanoseconds: NDArray[np.uint64], batch: TimedBatch
    ) -> None:
        """One step: u64[launches], and what it took."""
        steps = self._entries.setdefault(id(entry), _Steps(entry, kernels, np.zeros_like(nanoseconds)))
        steps.calls += 1
        steps.tokens += len(batch.positions)
        steps.nanoseconds += nanoseconds
        past = batch.positions[batch.query_start[:-1]]
        for window in {launch.window for launch in entry.launches}:
            steps.context[window] += int((np.minimum(past, window) if window else past).sum())

    def rows(self) -> tuple[ProfileRow, ...]:
        """One row for each launch of each entry, the slowest first."""
        rows = []
        for steps in self._entries.values():
            for launch, spent in zip(steps.entry.launches, steps.nanoseconds.tolist(), strict=True):
                counts = (steps.calls, steps.tokens, steps.context[launch.window])
                flops = sum(a * b for a, b in zip(launch.flops, counts, strict=True))
                moved = sum(a * b for a, b in zip(launch.bytes, counts, strict=True))
                rows.append(
                    ProfileRow(
                        steps.entry.name,
                        launch.node,
                        steps.kernels[launch.kernel],
                        steps.calls,
                        spent / 1e9,
                        flops,
                        moved,
                    )
                )
        return tuple(sorted(rows, key=lambda row: -row.seconds))


@dataclass
class Timings:
    """Tokens and seconds of one generation call, over all its prompts: a batch's completions share one.

    The first token of a completion comes out of its prefill. `profile` is empty unless `profile=True` was asked for.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    profile: tuple[ProfileRow, ...] = field(default=(), repr=False)

    def add_prefill(self, tokens: int, seconds: float) -> None:
        """Count a step that took tokens of prompts."""
        self.prefill_tokens += tokens
        self.prefill_seconds += seconds

    def add_decode(self, tokens: int, seconds: float) -> None:
        """Count a step that took one generated token of each of `tokens` sequences."""
        self.decode_tokens += tokens
        self.decode_seconds += seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second; 0 before the first."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Generated tokens per second, all sequences together; 0 before the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0
