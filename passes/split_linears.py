"""A linear whose result is cut across its heads becomes one linear for each part, over those rows of the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.linear import Linear
from llmc.ir.ops.shape import Reshape, Slice
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class SplitLinears(Pass):
    """linear(x, W) read as [tokens, groups, …] and sliced inside the groups: the rows of each slice, gathered by the
    pack program, are a weight of their own. `pack-linears` then joins them part by part."""

    name = "split-linears"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return context.rewrite(graph, PartOfLinear())


class PartOfLinear(Rule):
    """A slice inside a reshape [tokens, …] of a linear all of whose readers are such slices."""

    name = "part-of-linear"
    roots = (Slice,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        (heads,) = root.inputs
        if not isinstance(heads.op, Reshape):
            return NoMatch(f"what is sliced is no reshape, but {heads.op.name}", root)
        (y,) = heads.node.inputs
        if not isinstance(y.op, Linear) or y.op.activation != "none" or y.op.residual:
            return NoMatch(f"what is reshaped is no linear without activation and residual, but {y.op.name}", y.node, 1)
        if refusal := _other_reader(y, graph):
            return refusal
        operands = {"x": y.node.inputs[0], **{f"part{i}": v for i, v in enumerate(y.node.inputs[1:])}}
        attributes = {"inner": heads.type.shape[1:], "cut": root.op}
        return Match(root, operands, attributes, frozenset([root]), root.results)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        inner, cut = match.attributes["inner"], match.attributes["cut"]
        shape = match.root.types[0].shape
        rows = math.prod(d for d in shape[1:] if isinstance(d, int))
        chosen = []
        for i in range(len(match.operands) - 1):
            value = match[f"part{i}"]
            columns = value.type.shape[1:]
            split = b.reshape(value, shape=(*inner, *columns))
            kept = b.slice(split, axis=cut.axis - 1, start=cut.start, stop=cut.stop, step=cut.step)
            chosen.append(b.reshape(kept, shape=(rows, *columns)))
        return b.reshape(b.linear(match["x"], *chosen, bias=len(chosen) == 2), shape=shape)


def _other_reader(y: Value, graph: Graph) -> NoMatch | None:
    """Why a reader of the linear is no slice inside groups of its features: then it would be computed twice."""
    for heads, _ in graph.uses.get(y, ()):
        if not isinstance(heads.op, Reshape) or heads.types[0].rank < 3 or heads.types[0].shape[0] != y.type.shape[0]:
            return NoMatch(f"the linear is also read by {heads!r}, which leaves no groups of its features", heads, 2)
        for part, _ in graph.uses.get(heads.results[0], ()):
            if not isinstance(part.op, Slice) or part.op.axis < 2:
                return NoMatch(f"its groups are also read by {part!r}, no slice inside them", part, 3)
    return None
