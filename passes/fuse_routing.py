"""Routing, from its primitive form: scores of which all but the k best are masked, then divided and scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.elementwise import Add, AddScalar, Div, Mask, MulScalar, Sigmoid
from llmc.ir.ops.reduce import Softmax, Sum
from llmc.ir.ops.routing import GROUP_SCORES, TINY, Routing, TopK
from llmc.ir.ops.shape import Reshape
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.printer import op_text
from llmc.ir.rewrite import Rule
from llmc.ir.types import DType, TensorType
from llmc.passes.views import Refused


class RoutingRule(Rule):
    """mask(scores, top_k(choice), 0). The choice is of the scores, of them plus a bias, of the logits where these have
    the same order, and of the best groups alone."""

    name = "routing"
    roots = (Mask,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        try:
            return _match(root)
        except Refused as refused:
            return refused.refusal

    def rewrite(self, b: Emitter, match: Match) -> Any:
        op: Routing = match.attributes["op"]
        return b(op, *(match[name] for name in ("logits", "bias")[: 1 + op.bias]))


class NormalisedRouting(Rule):
    """routing / sum(routing): weights whose sum is 1."""

    name = "normalised-routing"
    roots = (Div,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        weights, total = root.inputs
        if not isinstance(weights.op, Routing):
            return NoMatch(f"want routing, found {weights.op.name}", root)
        if weights.op.normalise or weights.op.scale != 1.0:
            return NoMatch("the routing is divided or scaled already", root, 1)
        nodes = {root, weights.node, total.node}
        if isinstance(total.op, AddScalar) and 0 <= total.op.value <= TINY:
            (total,) = total.node.inputs
            nodes.add(total.node)
        if not isinstance(total.op, Sum) or total.node.inputs != (weights,):
            return NoMatch(f"want the sum of the weights as divisor, found {total.op.name}", root, 1)
        return _raised(root, weights, replace(weights.op, normalise=True), nodes)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        b.loc = match.attributes["loc"]
        return b(match.attributes["op"], *match.operands.values())


class ScaledRouting(NormalisedRouting):
    """routing · factor."""

    name = "scaled-routing"
    roots = (MulScalar,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        assert isinstance(root.op, MulScalar)
        (weights,) = root.inputs
        if not isinstance(weights.op, Routing):
            return NoMatch(f"want routing, found {weights.op.name}", root)
        scaled = replace(weights.op, scale=weights.op.scale * root.op.value)
        return _raised(root, weights, scaled, {root, weights.node})


def _raised(root: Node, weights: Value, op: Routing, nodes: set[Node]) -> Match:
    operands = {f"operand{i}": v for i, v in enumerate(weights.node.inputs)}
    return Match(root, operands, {"op": op, "loc": weights.node.loc}, frozenset(nodes), root.results)


def _match(root: Node) -> Match:
    scores, chosen = root.inputs
    assert isinstance(root.op, Mask)
    if root.op.value != 0.0 or not isinstance(chosen.op, TopK):
        raise Refused(f"want the k largest, else 0, found {chosen.op.name}, else {root.op.value}", root, 0)
    if not isinstance(scores.op, Softmax | Sigmoid):
        raise Refused(f"want scores of softmax or sigmoid, found {scores.op.name}", root, 1)
    (logits,) = scores.node.inputs
    if logits.type.rank != 2 or logits.type.dtype is not DType.F32 or chosen.type.shape != scores.type.shape:
        raise Refused(f"want logits f32 [tokens, experts], found {logits.type}", root, 2)
    scoring = "softmax" if isinstance(scores.op, Softmax) else "sigmoid"
    op = Routing(chosen.op.k, scoring, False, 1.0)
    nodes = {root, chosen.node, scores.node}
    (choice,) = chosen.node.inputs
    if isinstance(choice.op, Reshape):
        groups = _groups(choice)
        op = replace(op, groups=groups.count, top_groups=groups.kept, group_score=groups.score)
        nodes |= groups.nodes
        choice = groups.choice
    operands = {"logits": logits}
    if isinstance(choice.op, Add) and scores in choice.node.inputs:
        (bias,) = [v for v in choice.node.inputs if v != scores] or [scores]
        if bias.type != TensorType(DType.F32, logits.type.shape[1:]):
            raise Refused(f"what is added to the scores, {bias.type}, is no bias [experts]", choice.node, 4)
        op = replace(op, bias=True)
        operands["bias"] = bias
        nodes.add(choice.node)
    elif choice != scores and (choice != logits or scoring != "softmax" or op.group_score != "max"):
        raise Refused(f"the choice is by {choice.op.name}, not by the scores that are masked", choice.node, 4)
    return Match(root, operands, {"op": op}, frozenset(nodes), root.results)


@dataclass(frozen=True)
class _Groups:
    """Choice scores behind those of which all but the best groups are minus infinity."""

    choice: Value
    count: int
    kept: int
    score: str
    nodes: frozenset[Node]


def _groups(limited: Value) -> _Groups:
    """reshape(mask(grouped, top_k(sum(mask(grouped, top_k(grouped, 1 or 2), 0))), -inf)), grouped [t, groups, size]."""
    masked = limited.node.inputs[0]
    if masked.op != Mask(-math.inf):
        raise Refused(f"want -inf as choice scores outside the best groups, found {_shown(masked)}", masked.node, 3)
    grouped, kept = masked.node.inputs
    if not isinstance(grouped.op, Reshape) or grouped.type.rank != 3:
        raise Refused(f"want choice scores in groups, found {grouped.op.name}", masked.node, 3)
    (choice,) = grouped.node.inputs
    tokens, count, size = grouped.type.shape
    if choice.type.shape != limited.type.shape or kept.type.shape != (tokens, count, 1):
        raise Refused(f"{choice.type} is not cut into runs of {size} experts", masked.node, 3)
    best = kept.node.inputs[0] if isinstance(kept.op, Reshape) else kept
    if not isinstance(best.op, TopK) or best.type.shape != (tokens, count):
        raise Refused(f"want the best of {count} groups, found {best.op.name}", best.node, 3)
    (scores,) = best.node.inputs
    total = scores.node.inputs[0] if isinstance(scores.op, Reshape) else scores
    largest = total.node.inputs[0] if isinstance(total.op, Sum) else total
    if largest.op != Mask(0.0) or largest.node.inputs[0] != grouped:
        raise Refused(f"want sums of a group's largest choice scores, found {total.op.name}", total.node, 3)
    which = largest.node.inputs[1]
    names = {TopK(n): name for name, n in GROUP_SCORES.items()}
    if which.op not in names or which.node.inputs != (grouped,):
        raise Refused(f"want the largest or the two largest of a group, found {_shown(which)}", which.node, 3)
    assert isinstance(count, int) and isinstance(best.op, TopK)
    nodes = {v.node for v in (limited, masked, grouped, kept, best, scores, total, largest, which)}
    return _Groups(choice, count, best.op.k, names[which.op], frozenset(nodes))


def _shown(value: Value) -> str:
    """The op that makes a value, as the text form has it."""
    return "".join(op_text(value.op))
