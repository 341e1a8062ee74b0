"""What is measured, and what is made of the rounds: medians, quartiles of paired ratios, shares of the bandwidth."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

DEFAULT = "prefill,decode@0,decode@512,decode@1024,batch8@32"
BATCH = re.compile(r"batch(\d+)@(\d+)")


@dataclass(frozen=True)
class Measure:
    """Prefill of `tokens` tokens, or `tokens` greedy steps of `sequences` sequences that hold `depth` tokens each."""

    name: str
    kind: str
    tokens: int
    depth: int = 0
    sequences: int = 1

    @property
    def total(self) -> int:
        """The tokens that its tokens per second count, all sequences together."""
        return self.tokens * self.sequences

    @property
    def context(self) -> int:
        """The longest context that a sequence reaches."""
        return self.depth + self.tokens


def parse_measures(text: str, prefill: int, decode: int) -> list[Measure]:
    """From `prefill,decode@512,batch8@32`: decode at a depth, or that many sequences. Raises `ValueError`."""
    measures = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name == "prefill":
            measures.append(Measure(name, "prefill", prefill))
        elif name.startswith("decode@") and name.removeprefix("decode@").isdigit():
            measures.append(Measure(name, "decode", decode, int(name.removeprefix("decode@"))))
        elif (found := BATCH.fullmatch(name)) and int(found[1]) > 0:
            measures.append(Measure(name, "decode", decode, int(found[2]), int(found[1])))
        else:
            raise ValueError(f"measure {name!r}: expected prefill, decode@DEPTH or batchSEQUENCES@DEPTH")
    if not measures:
        raise ValueError(f"no measures in {text!r}; for example {DEFAULT}")
    return measures


@dataclass(frozen=True)
class Run:
    """One system's run of one measure.

    `probe`: bytes a second of a plain read, the mean of right before and right after. `idle`: cores that the other
    workers used meanwhile, which must be none. `foreign`: cores that everything else on the machine used.
    """

    round: int
    measure: str
    system: str
    seconds: float
    probe: float
    idle: float
    foreign: float

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value; a single one is its own quartiles."""
        values = list(values)
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)


def step_bytes(facts: dict[str, Any], measure: Measure) -> float:
    """Bytes that one decode step moves, at the mean depth of the steps; see `protocol.System.facts`."""
    fixed, token, context = facts["step_bytes"]
    depth = measure.depth + (measure.tokens - 1) / 2
    return float(fixed + measure.sequences * (token + context * depth))


def summarize(
    measure: Measure, system: str, runs: Sequence[Run], facts: dict[str, Any], reference: str
) -> dict[str, Any] | None:
    """One system at one measure; None where it did not run.

    `ratio`: how many times as fast `reference` is, from pairs of the same round, as a `Spread`.
    """
    own = {run.round: run for run in runs if run.measure == measure.name and run.system == system}
    if not own:
        return None
    base = {run.round: run for run in runs if run.measure == measure.name and run.system == reference}
    pairs = [own[r].seconds / base[r].seconds for r in own if r in base]
    seconds = statistics.median(run.seconds for run in own.values())
    probe = statistics.median(run.probe for run in own.values())
    result: dict[str, Any] = {
        "measure": measure.name,
        "system": system,
        "rounds": len(own),
        "tokens_per_second": measure.total / seconds,
        "ratio": asdict(Spread.of(pairs)) if pairs and system != reference else None,
        "probe": probe,
        "idle": max(run.idle for run in own.values()),
        "foreign": statistics.median(run.foreign for run in own.values()),
    }
    if measure.kind == "decode" and "step_bytes" in facts:
        moved = step_bytes(facts, measure) * measure.tokens
        result["bandwidth"] = moved / seconds
        # In pairs too: the machine's bandwidth changes from one moment to the next.
        result["share"] = statistics.median(moved / run.seconds / run.probe for run in own.values())
    return result
