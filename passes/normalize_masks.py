"""Masks that are added to scores become masks that choose: one form of causality for the rules that look for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.elementwise import Add, AddScalar, GreaterEqual, LogicalAnd, Mask
from llmc.ir.ops.reduce import Softmax
from llmc.ir.ops.shape import Constant, Expand
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.ir.types import broadcast
from llmc.passes.base import Pass, PassContext
from llmc.passes.views import through_reshapes

_HIDDEN = -1e30
"""Added to a score, this or less makes it weigh exactly nothing in a softmax in which another score stays."""


@dataclass(frozen=True)
class NormalizeMasks(Pass):
    """softmax(scores + mask(0, visible, -large)) becomes softmax(mask(scores, visible, -inf)); a condition that a mask
    repeats anyway is not repeated before.

    The large number is any that hides (float types' least, as exporters write); every token must see itself, so that no
    row is hidden whole: such a row would weigh its scores alike in the one form and not at all in the other.
    """

    name = "normalize-masks"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return context.rewrite(context.rewrite(graph, AddedMask()), ExpandedMask())


class ExpandedMask(Rule):
    """A condition repeated to the shape of what it masks: masking repeats it anyway."""

    name = "expanded-mask"
    roots = (Mask,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        x, visible = root.inputs
        condition = _unexpanded(visible)
        if condition == visible:
            return NoMatch("the condition is not expanded", root)
        if broadcast(x.type.shape, condition.type.shape) != root.types[0].shape:
            return NoMatch("expanding the condition expands the result", root, 1)
        return Match(root, {"x": x, "condition": condition}, {}, frozenset([root]), root.results)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        assert isinstance(match.root.op, Mask)
        return b.mask(match["x"], match["condition"], value=match.root.op.value)


class AddedMask(Rule):
    """scores + mask(0, visible, -large), read by softmax alone."""

    name = "added-mask"
    roots = (Add,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        added = [(x, y) for x, y in (root.inputs, root.inputs[::-1]) if isinstance(_unexpanded(y).op, Mask)]
        if not added:
            return NoMatch("neither operand is a mask of constants", root)
        scores, mask = added[0]
        node = _unexpanded(mask).node
        base, visible = node.inputs
        assert isinstance(node.op, Mask)
        if not isinstance(base.op, Constant) or base.op.value.array.astype(float).any():
            return NoMatch("what the mask leaves is not 0", node, 1)
        if node.op.value > _HIDDEN:
            return NoMatch(f"the mask adds {node.op.value}, which hides nothing", node, 1)
        if broadcast(scores.type.shape, visible.type.shape) != root.types[0].shape:
            return NoMatch("the mask is larger than the scores", node, 2)
        readers = graph.uses.get(root.results[0], ())
        if root.results[0] in graph.results or not readers or not all(isinstance(n.op, Softmax) for n, _ in readers):
            return NoMatch("the masked scores have another reader than a softmax", root, 3)
        if not _sees_itself(visible):
            return NoMatch("a token may not see itself, so a whole row may be hidden", visible.node, 4)
        return Match(root, {"scores": scores, "visible": visible}, {}, frozenset([root]), root.results)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        return b.mask(match["scores"], match["visible"], value=-math.inf)


def _unexpanded(value: Value) -> Value:
    while isinstance(value.op, Expand):
        (value,) = value.node.inputs
    return value


def _sees_itself(visible: Value) -> bool:
    """Whether all conditions compare a vector with itself, moved towards true."""
    value = through_reshapes(visible)
    if isinstance(value.op, LogicalAnd):
        return all(map(_sees_itself, value.node.inputs))
    if not isinstance(value.op, GreaterEqual):
        return False
    left, right = (through_reshapes(v) for v in value.node.inputs)
    if isinstance(left.op, AddScalar) and left.op.value >= 0:
        left = through_reshapes(left.node.inputs[0])
    return left == right and left.type.rank == 1
