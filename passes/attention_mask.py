"""What a mask of scores means: causality and a window, from comparisons of positions in whatever form."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmc.ir.errors import LlmcError
from llmc.ir.op import Node, Value
from llmc.ir.ops.elementwise import GreaterEqual, LogicalAnd
from llmc.ir.ops.shape import Expand, Reshape, Transpose
from llmc.ir.pattern import NoMatch
from llmc.ir.types import Dim, DType, TensorType, upper_bound
from llmc.passes.position_forms import Form, form, moved, single


class Refused(Exception):
    """Why a subgraph is no attention; the NoMatch is the argument."""

    def __init__(self, reason: str, node: Node, depth: int) -> None:
        super().__init__(reason)
        self.refusal = NoMatch(reason, node, depth)


@dataclass(frozen=True)
class Condition:
    """`form` >= 0, where keys are along axis 0 and queries along axis 1."""

    form: Form
    node: Node


def conditions(visible: Value) -> list[Condition]:
    """The conditions that hold together where a mask [.., queries, keys] does. Raises `Refused` for anything else than
    comparisons of positions."""
    node = visible.node
    if single(visible) == 1.0:
        return []
    if isinstance(visible.op, LogicalAnd):
        return [c for v in node.inputs for c in conditions(v)]
    if isinstance(visible.op, Reshape | Expand | Transpose):
        found = []
        for inner in conditions(node.inputs[0]):
            there = moved(inner.form, visible)
            if there is None:
                raise Refused("the mask is read in another shape, in which its axes are mixed", node, 4)
            found.append(Condition(there, inner.node))
        return found
    if not isinstance(visible.op, GreaterEqual):
        raise Refused(f"the mask is no comparison of positions (found {visible.op.name})", node, 4)
    large, small = (form(v) for v in node.inputs)
    if large is None or small is None:
        other = node.inputs[0 if large is None else 1]
        raise Refused(f"the mask compares something else than positions: {other.op.name}", other.node, 4)
    return [Condition(large.plus(small, -1.0), node)]


def causal_window(found: list[Condition], tokens: Dim) -> tuple[Value, int]:
    """The positions i32 [tokens] that the conditions compare, and the window that they leave to a token, 0 without one
    or where no sequence is longer. Raises `Refused` where a token would see others after it, or not itself."""
    vectors = {vector for c in found for _, vector in c.form.terms}
    node = found[0].node
    if len(vectors) != 1:
        raise Refused("the mask does not compare one vector of positions with itself", node, 4)
    (positions,) = vectors
    if positions.type != TensorType(DType.I32, (tokens,)):
        raise Refused(f"positions are {positions.type}, want i32[{tokens}]", node, 5)
    windows: list[int] = []
    causal = False
    for condition in found:
        terms = {axis: c for (axis, _), c in condition.form.terms.items()}
        slack = math.floor(condition.form.constant)
        if terms == {1: 1.0, 0: -1.0}:  # query - key + slack >= 0
            if slack < 0:
                raise Refused("the mask hides a token from itself", condition.node, 5)
            causal = causal or slack == 0
        elif terms == {0: 1.0, 1: -1.0}:  # key - query + slack >= 0
            if slack < 0:
                raise Refused("the mask hides a token from itself", condition.node, 5)
            windows.append(slack + 1)
        else:
            raise Refused("the mask is no bound on the distance of two positions", condition.node, 5)
    if not causal:
        raise Refused("the mask is not causal: tokens would see those after them", node, 5)
    return positions, _needed(min(windows, default=0), tokens)


def _needed(window: int, tokens: Dim) -> int:
    """The window, or 0 where the longest sequence fits into it."""
    try:
        longest = upper_bound(tokens)
    except LlmcError:  # a symbol without an upper bound
        return window
    return window if window < longest else 0
