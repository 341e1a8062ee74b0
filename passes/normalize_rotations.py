"""Rotations written with tables of doubled width become rotations of pairs, on tokens first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.elementwise import Add, Cast, Cos, Mul, MulScalar, Neg, Sin
from llmc.ir.ops.shape import Concat, Reshape, Slice
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.ir.types import Shape
from llmc.passes.base import Pass, PassContext
from llmc.passes.views import reshaped, through_transposes


@dataclass(frozen=True)
class NormalizeRotations(Pass):
    """x · [c, c] + [-x₂, x₁] · [s, s] becomes [x₁ · c - x₂ · s, x₂ · c + x₁ · s], where x₁ and x₂ are x's halves; of x
    before its heads were put first."""

    name = "normalize-rotations"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return context.rewrite(graph, DoubledTables())


class DoubledTables(Rule):
    """The sum of a product with x and one with its halves exchanged, the second half negated."""

    name = "doubled-tables"
    roots = (Add,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        refusal = NoMatch("neither term is a product with exchanged halves", root)
        for straight, turned in (root.inputs, root.inputs[::-1]):
            if not isinstance(straight.op, Mul) or not isinstance(turned.op, Mul):
                continue
            for exchanged, sines in (turned.node.inputs, turned.node.inputs[::-1]):
                x = _exchanged(exchanged)
                if x is None:
                    continue
                if x not in straight.node.inputs:
                    refusal = NoMatch("the other term is no product with the same value", straight.node, 2)
                    continue
                cosines = straight.node.inputs[straight.node.inputs[0] == x]
                found = _match(root, x, cosines, sines)
                if isinstance(found, Match):
                    return found
                refusal = found
        return refusal

    def rewrite(self, b: Emitter, match: Match) -> Any:
        x, axes = through_transposes(match["x"])
        shape = match["x"].type.shape
        last, width = len(shape) - 1, shape[-1]
        assert isinstance(width, int)
        tables = []
        for name in ("cosines", "sines"):
            half = _half(b, match[name])
            assert half is not None
            tables.append(reshaped(b, half, _before(half.type.shape, axes)))
        cos, sin = tables
        first = b.slice(x, axis=last, start=0, stop=width // 2)
        second = b.slice(x, axis=last, start=width // 2, stop=width)
        turned = b.sub(b.mul(first, cos), b.mul(second, sin)), b.add(b.mul(second, cos), b.mul(first, sin))
        joined = b.concat(*turned, axis=last)
        return joined if axes == tuple(range(len(axes))) else b.transpose(joined, axes=axes)


def _match(root: Node, x: Value, cosines: Value, sines: Value) -> Match | NoMatch:
    _, axes = through_transposes(x)
    for name, table in (("cosines", cosines), ("sines", sines)):
        half = _half(Emitter(), table)
        if half is None:
            return NoMatch(f"the halves of the {name} are not seen to be the same", table.node, 3)
        if axes[-1] != len(axes) - 1 or not _moves_units_only(half.type.shape, axes):
            return NoMatch(f"the {name} {table.type} do not follow the axes back", table.node, 4)
    nodes = frozenset({root, *(v.node for v in root.inputs)})
    return Match(root, {"x": x, "cosines": cosines, "sines": sines}, {}, nodes, root.results)


def _exchanged(value: Value) -> Value | None:
    """The x of concat(-x₂, x₁) along the last axis, where x₁ and x₂ are its halves."""
    if not isinstance(value.op, Concat) or value.op.axis != value.type.rank - 1 or len(value.node.inputs) != 2:
        return None
    negative, first = value.node.inputs
    if not isinstance(negative.op, Neg) or not isinstance(first.op, Slice):
        return None
    second = negative.node.inputs[0]
    width, axis = value.type.shape[-1], value.op.axis
    assert isinstance(width, int)
    halves = (Slice(axis, 0, width // 2), Slice(axis, width // 2, width))
    if (first.op, second.op) != halves or first.node.inputs != second.node.inputs:
        return None
    x = first.node.inputs[0]
    return x if x.type == value.type else None


def _half(b: Emitter, table: Value) -> Value | None:
    """The first half along the last axis of a table whose halves are made alike."""
    op = table.op
    if isinstance(op, Concat) and op.axis == table.type.rank - 1:
        parts = table.node.inputs
        return parts[0] if len(parts) == 2 and parts[0] == parts[1] else None
    if isinstance(op, Cos | Sin | MulScalar | Cast):
        half = _half(b, table.node.inputs[0])
        return None if half is None else b.one(op, half)
    if isinstance(op, Reshape) and op.shape[-1:] == table.node.inputs[0].type.shape[-1:]:
        half = _half(b, table.node.inputs[0])
        return None if half is None else reshaped(b, half, (*op.shape[:-1], half.type.shape[-1]))
    return None


def _padded(shape: Shape, rank: int) -> Shape:
    return (*(1,) * (rank - len(shape)), *shape)


def _before(shape: Shape, axes: tuple[int, ...]) -> Shape:
    """The shape of a table that broadcasts to the value, before the axes were put in that order."""
    wide = _padded(shape, len(axes))
    return tuple(wide[axes.index(i)] for i in range(len(axes)))


def _moves_units_only(shape: Shape, axes: tuple[int, ...]) -> bool:
    """Whether putting the axes back is a reshape of the table."""
    return [d for d in _before(shape, axes) if d != 1] == [d for d in shape if d != 1]
