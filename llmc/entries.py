"""The entry points of a package: one lowered step under three sets of bounds."""

from __future__ import annotations

from collections.abc import Iterator

from llmc.ir.graph import Graph
from llmc.options import Limits
from llmc.passes.base import Pipeline
from llmc.passes.specialize import Specialize


def specialised(lowered: Graph, limits: Limits) -> Iterator[tuple[str, Graph]]:
    """The lowered graph under each entry point's bounds."""
    for name, tokens in (("decode", limits.sequences), ("prefill", limits.tokens), ("verify", limits.verify_tokens)):
        bounds = Specialize(name, tokens, limits.sequences, limits.outputs)
        yield name, Pipeline((bounds,)).run(lowered)
