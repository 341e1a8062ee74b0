"""Residual additions go into the linears before them, which then write sums instead of addends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.elementwise import Add
from llmc.ir.ops.linear import Linear
from llmc.ir.ops.norm import AddLayerNorm, AddRmsNorm, LayerNorm, RmsNorm
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class FuseResidual(Pass):
    """linear(x, W) + r becomes linear(x, W, r) with `residual`; of add_rms_norm and add_layer_norm the norm remains."""

    name = "fuse-residual"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return context.rewrite(graph, ResidualIntoLinear())


class ResidualIntoLinear(Rule):
    """A sum of which one addend is a linear without activation and residual that nothing else reads.

    Where both are, the one that is computed later takes the addition: the other is there by then.
    """

    name = "linear-residual"
    roots = (Add, AddRmsNorm, AddLayerNorm)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        addends = root.inputs[:2]
        reasons = [_unfit(v, graph) for v in addends]
        fitting = [i for i, reason in enumerate(reasons) if reason is None]
        if not fitting:
            return max((r for r in reasons if r is not None), key=lambda r: r.depth)
        if addends[0].type != addends[1].type:
            types = " and ".join(str(v.type) for v in addends)
            return NoMatch(f"the addends {types} are broadcast", root, 2)
        chosen = fitting[0]
        if len(fitting) == 2:
            chosen = max(fitting, key=lambda i: graph.nodes.index(addends[i].node))
        linear = addends[chosen].node
        operands = {f"operand{i}": v for i, v in enumerate(linear.inputs)}
        operands["residual"] = addends[1 - chosen]
        operands |= {f"norm{i}": v for i, v in enumerate(root.inputs[2:])}
        return Match(root, operands, {"linear": linear}, frozenset([root, linear]), root.results)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        linear, norm = match.attributes["linear"], match.root.op
        place, b.loc = b.loc, linear.loc
        inputs = [match[f"operand{i}"] for i in range(len(linear.inputs))]
        total = b.one(Linear(linear.op.bias, residual=True), *inputs, match["residual"])
        b.loc = place
        vectors = [match[f"norm{i}"] for i in range(len(match.root.inputs) - 2)]
        if isinstance(norm, AddRmsNorm):
            return total, b.one(RmsNorm(norm.eps), total, *vectors)
        if isinstance(norm, AddLayerNorm):
            return total, b.one(LayerNorm(norm.eps), total, *vectors)
        return total


def _unfit(addend: Value, graph: Graph) -> NoMatch | None:
    """Why an addend cannot take the other in; None where it can."""
    node, op = addend.node, addend.op
    if not isinstance(op, Linear):
        return NoMatch(f"want linear, found {op.name}", node)
    if op.activation != "none":
        return NoMatch(f"the linear has the activation {op.activation}", node, 1)
    if op.residual:
        return NoMatch("the linear has a residual already", node, 1)
    if len(graph.uses[addend]) > 1 or addend in graph.results:
        return NoMatch("the linear's own result is also used elsewhere", node, 1)
    return None
