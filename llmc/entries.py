"""The entry points of a package: one lowered step under three sets of bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llmc.ir.graph import Graph
from llmc.options import Limits
from llmc.passes.base import Pipeline
from llmc.passes.specialize import Specialize

ENTRIES = ("decode", "prefill", "verify")
"""All of them, as a CPU package has them."""


def specialised(lowered: Graph, limits: Limits, names: Sequence[str] = ENTRIES) -> Iterator[tuple[str, Graph]]:
    """The lowered graph under the bounds of each of the entry points `names`."""
    tokens_of = {"decode": limits.sequences, "prefill": limits.tokens, "verify": limits.verify_tokens}
    for name in names:
        tokens = tokens_of[name]
        bounds = Specialize(name, tokens, limits.sequences, limits.outputs)
        yield name, Pipeline((bounds,)).run(lowered)
