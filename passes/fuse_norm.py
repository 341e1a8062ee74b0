"""Normalisations, from their primitive forms; then the residual additions before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.ir.graph import Graph
from llmc.ir.op import ConstantData, Emitter, Value
from llmc.ir.ops.norm import AddLayerNorm, AddRmsNorm, LayerNorm, RmsNorm
from llmc.ir.ops.shape import Constant
from llmc.ir.pattern import Match, NoMatch, Var
from llmc.ir.rewrite import Fuse, PatternRule
from llmc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class FuseNorm(Pass):
    """`rms_norm` and `layer_norm`, then `add_rms_norm` and `add_layer_norm`, which also return the sum."""

    name = "fuse-norm"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        # Layer norms first: they hold the form of an RMS norm; and first those with a bias, which hold that without.
        graph = context.rewrite(graph, FuseVectors(LayerNorm))
        graph = context.rewrite(graph, UnbiasedLayerNorm())
        graph = context.rewrite(graph, FuseVectors(RmsNorm))
        return context.rewrite(graph, Fuse(AddRmsNorm), Fuse(AddLayerNorm))


class FuseVectors(Fuse):
    """A norm whose weight and bias are vectors: a product with another activation looks the same otherwise. Two norms
    of one value have their statistics in common."""

    shares = True

    def check(self, match: Match, graph: Graph) -> NoMatch | None:
        return _no_vectors(match, self.operand_names)


class UnbiasedLayerNorm(PatternRule):
    """A layer norm without a bias is one whose bias is zero."""

    name = "unbiased-layer-norm"
    operand_names = ("x", "weight")
    shares = True

    def pattern(self, b: Emitter, *operands: Value) -> Value:
        x, weight = operands
        centred = b.sub(x, b.mean(x))
        scale = b.rsqrt(b.add_scalar(b.mean(b.mul(centred, centred)), value=Var("eps")))
        result: Value = b.mul(b.mul(centred, scale), weight)
        return result

    def check(self, match: Match, graph: Graph) -> NoMatch | None:
        return _no_vectors(match, self.operand_names)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        x, weight = match["x"], match["weight"]
        zeros = ConstantData(np.zeros(weight.type.concrete({}), weight.type.dtype.numpy))
        return b.layer_norm(x, weight, b.one(Constant(weight.type.dtype, zeros)), **match.attributes)


def _no_vectors(match: Match, names: Sequence[str]) -> NoMatch | None:
    x, *vectors = (match[name] for name in names)
    for vector in vectors:
        if vector.type.shape != x.type.shape[-1:]:
            reason = f"what scales or shifts {x.type} is {vector.type}, no vector"
            return NoMatch(reason, match.root, len(match.nodes))
    return None
