"""Normalisations, from their primitive forms; then the residual additions before them."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.ir.graph import Graph
from llmc.ir.ops.norm import AddLayerNorm, AddRmsNorm, LayerNorm, RmsNorm
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Fuse
from llmc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class FuseNorm(Pass):
    """`rms_norm` and `layer_norm`, then `add_rms_norm` and `add_layer_norm`, which also return the sum."""

    name = "fuse-norm"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        graph = context.rewrite(graph, FuseVectors(LayerNorm))  # first: it holds the form of an RMS norm
        graph = context.rewrite(graph, FuseVectors(RmsNorm))
        return context.rewrite(graph, Fuse(AddRmsNorm), Fuse(AddLayerNorm))


class FuseVectors(Fuse):
    """A norm whose weight and bias are vectors: a product with another activation looks the same otherwise."""

    def check(self, match: Match, graph: Graph) -> NoMatch | None:
        x, *vectors = (match[name] for name in self.operand_names)
        for vector in vectors:
            if vector.type.shape != x.type.shape[-1:]:
                reason = f"what scales or shifts {x.type} is {vector.type}, no vector"
                return NoMatch(reason, match.root, len(match.nodes))
        return None
