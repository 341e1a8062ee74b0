"""Entry points: the same step under bounds on its symbols."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.ir.errors import LlmcError, nearest
from llmc.ir.graph import Graph
from llmc.ir.types import Dim, symbol
from llmc.passes.base import Pass, PassContext, Trial
from llmc.passes.trials import random_trial

ENTRIES = {"decode": 64, "prefill": 512, "verify": 64}
"""Entry points, with how many tokens a step of each takes at most by default."""


@dataclass(frozen=True)
class Specialize(Pass):
    """Bounds for one entry point: `decode` has one token for each sequence (so that `sequences` becomes `tokens`),
    `prefill` and `verify` have several. A bound that is left out is the entry's own."""

    name = "specialize"
    stage = "step"

    entry: str
    tokens: int | None = None
    sequences: int = 64
    outputs: int = 64

    def __post_init__(self) -> None:
        if self.entry not in ENTRIES:
            raise LlmcError(f"there is no entry point {self.entry!r}; {nearest(self.entry, ENTRIES)}")
        for name in ("tokens", "sequences", "outputs"):
            bound = getattr(self, name)
            if bound is not None and bound < 1:
                raise LlmcError(f"{name} must be at least 1, given {bound}")

    def run(self, graph: Graph, context: PassContext) -> Graph:
        missing = {"tokens", "sequences", "outputs"} - set(graph.symbols)
        if missing:
            raise LlmcError(f"no step over a batch: the graph has no symbol {min(missing)!r} (run paged-kv first)")
        if not context.fire("specialize"):
            return graph
        limit = self.tokens or (self.sequences if self.entry == "decode" else ENTRIES[self.entry])
        limit = min([limit, *([self.sequences] if self.entry == "decode" else [])])
        tokens = symbol("tokens", 1, limit)
        sequences = tokens if self.entry == "decode" else symbol("sequences", 1, min(self.sequences, limit))
        bounds: dict[str, Dim] = {
            "tokens": tokens,
            "sequences": sequences,
            "outputs": symbol("outputs", 1, min(self.outputs, limit)),
        }
        context.record.numbers["tokens"] = limit
        return graph.substitute(bounds)

    def trials(self, before: Graph, after: Graph, given: Trial) -> tuple[Trial, Trial]:
        """A batch that fits the tighter bounds, and so the wider ones."""
        fitting = random_trial(after)
        return fitting, fitting
