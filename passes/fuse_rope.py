"""Rotary position embedding, from its primitive form: the tables of cosines and sines, and the rotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Op, Value
from llmc.ir.ops.elementwise import Cast, Cos, Mul, MulScalar, Sin
from llmc.ir.ops.shape import Reshape, Slice
from llmc.ir.pattern import Match, NoMatch, Var
from llmc.ir.rewrite import PatternRule, Rule
from llmc.ir.types import DType, TensorType
from llmc.passes.base import Pass, PassContext
from llmc.passes.views import reshaped


@dataclass(frozen=True)
class FuseRope(Pass):
    """`rotary_table`, once in a model; then `rope` of queries and keys: halves or interleaved, whole or in part."""

    name = "fuse-rope"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        graph = context.rewrite(graph, Table())
        return context.rewrite(graph, HalfRope(), PartialHalfRope(), InterleavedRope(), PartialInterleavedRope())


class Table(Rule):
    """cos and sin of positions (a column) times frequencies (a row), each perhaps times one factor."""

    name = "rotary-table"
    roots = (Sin,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        (angles,) = root.inputs
        cosines = [n for n, _ in graph.uses[angles] if isinstance(n.op, Cos)]
        if len(cosines) != 1 or not isinstance(angles.op, Mul):
            return NoMatch("want the sine and the cosine of one product", root)
        for column, row in (angles.node.inputs, angles.node.inputs[::-1]):
            positions = _positions(column)
            if positions is None or row.type.rank not in (1, 2) or angles.type.shape[1:] != row.type.shape[-1:]:
                continue
            cos, sin, scaling = _scaled(graph, cosines[0], root)
            nodes = frozenset({cosines[0], root, cos.node, sin.node, angles.node})
            return Match(root, {"positions": positions, "row": row}, {"scaling": scaling}, nodes, (cos, sin))
        return NoMatch(
            "the angles are no product of positions i32[t] and frequencies [d], [1, d] or [t, d]", angles.node, 1
        )

    def rewrite(self, b: Emitter, match: Match) -> Any:
        row = match["row"]
        if row.type.rank == 2 and row.type.shape[0] == 1:
            row = reshaped(b, row, row.type.shape[1:])
        return b.rotary_table(match["positions"], row, scaling=match.attributes["scaling"])


def _positions(column: Value) -> Value | None:
    """The i32[t] that a float column [t, 1] is made of."""
    if column.type.rank != 2 or column.type.shape[1] != 1:
        return None
    value = column
    while isinstance(value.op, Cast | Reshape):
        value = value.node.inputs[0]
    return value if value.type == TensorType(DType.I32, column.type.shape[:1]) else None


def _scaled(graph: Graph, cos: Node, sin: Node) -> tuple[Value, Value, float]:
    """The tables after the factor that all readers of both apply, if there is one."""
    found: list[tuple[Value, float]] = []
    for node in (cos, sin):
        readers = graph.uses.get(node.results[0], ())
        reader = readers[0][0] if len(readers) == 1 and node.results[0] not in graph.results else node
        if isinstance(reader.op, MulScalar):
            found.append((reader.results[0], reader.op.value))
    if len(found) == 2 and found[0][1] == found[1][1]:
        return found[0][0], found[1][0], found[0][1]
    return cos.results[0], sin.results[0], 1.0


def _turned(b: Emitter, *operands: Value) -> tuple[Value, Value]:
    """The rotation of pairs (first, second)."""
    first, second, cos, sin = operands
    return b.sub(b.mul(first, cos), b.mul(second, sin)), b.add(b.mul(second, cos), b.mul(first, sin))


class RopeRule(PatternRule):
    """A rotation of slices of [t, heads, head_dim]; subclasses say how the pairs are put together again.

    Of heads whose last elements alone are rotated, these are cut out and rotated as heads of their own.
    """

    layout = "half"

    def check(self, match: Match, graph: Graph) -> NoMatch | None:
        first, second = match["first"], match["second"]
        if not (isinstance(first.op, Slice) and isinstance(second.op, Slice)):
            return NoMatch("what is rotated are no slices", match.root, len(match.nodes))
        heads = first.node.inputs[0]
        if heads != second.node.inputs[0] or heads.type.rank != 3:
            return NoMatch("the pairs are no slices of one [tokens, heads, head_dim]", match.root, len(match.nodes))
        half = first.type.shape[2]
        assert isinstance(half, int)
        start = min(first.op.start, second.op.start)
        if (first.op, second.op) != self.slices(start, half):
            wanted = " and ".join(map(str, self.slices(start, half)))
            return NoMatch(f"want {wanted}, found {first.op} and {second.op}", match.root, len(match.nodes))
        return self.check_rest(match, heads, start, 2 * half) or self.check_tables(match, heads, half)

    def slices(self, start: int, half: int) -> tuple[Op, Op]:
        """The slices that hold the first and the second of each pair, from element `start` of a head on."""
        stop = start + 2 * half
        if self.layout == "half":
            return Slice(2, start, start + half), Slice(2, start + half, stop)
        return Slice(2, start, stop, 2), Slice(2, start + 1, stop, 2)

    def check_rest(self, match: Match, heads: Value, start: int, rotary_dim: int) -> NoMatch | None:
        """Whether the head from `start` on is passed on, what is not rotated of it too."""
        head_dim, rest = heads.type.shape[2], match.operands.get("rest")
        assert isinstance(head_dim, int)
        if rest is None and start + rotary_dim != head_dim:
            return NoMatch(f"{rotary_dim} of {head_dim} elements are rotated and the rest is left out", match.root, 1)
        if rest is None or (rest.op == Slice(2, start + rotary_dim, head_dim) and rest.node.inputs[0] == heads):
            return None
        return NoMatch(f"what follows the {rotary_dim} rotated elements is not the head's rest", match.root, 1)

    def check_tables(self, match: Match, heads: Value, half: int) -> NoMatch | None:
        """Whether the tables are [t, half], the same for every head."""
        tokens = heads.type.shape[0]
        for name in ("cos", "sin"):
            table = match[name]
            if table.type.shape != (tokens, 1, half) or _table(table).type.shape != (tokens, half):
                reason = f"{name} is {table.type}, want a table [tokens, 1, {half}]"
                return NoMatch(reason, match.root, len(match.nodes))
        return None

    def rewrite(self, b: Emitter, match: Match) -> Any:
        first = match["first"]
        assert isinstance(first.op, Slice)
        heads = first.node.inputs[0]
        if first.op.start:
            heads = b.slice(heads, axis=2, start=first.op.start, stop=heads.type.shape[2])
        tokens, count, head_dim = heads.type.shape
        half = match["first"].type.shape[2]
        assert isinstance(count, int) and isinstance(head_dim, int) and isinstance(half, int)
        flat = reshaped(b, heads, (tokens, count * head_dim))
        tables = (_table(match["cos"]), _table(match["sin"]))
        op = {"num_heads": count, "head_dim": head_dim, "rotary_dim": 2 * half, "layout": self.layout}
        return reshaped(b, b.rope(flat, *tables, **op), match.replaced[0].type.shape)


def _table(value: Value) -> Value:
    """The [t, half] behind the axis that broadcasts over heads."""
    wanted = (value.type.shape[0], value.type.shape[-1])
    while value.type.shape != wanted and isinstance(value.op, Reshape):
        value = value.node.inputs[0]
    return value


class HalfRope(RopeRule):
    """Whole heads, pairs (i, i + half)."""

    name = "rope"
    operand_names: Sequence[str] = ("first", "second", "cos", "sin")

    def pattern(self, b: Emitter, *operands: Value) -> Any:
        return b.concat(*_turned(b, *operands), axis=2)


class PartialHalfRope(RopeRule):
    """The first part of a head in pairs (i, i + half), the rest as it is."""

    name = "rope-part"
    operand_names: Sequence[str] = ("first", "second", "cos", "sin", "rest")

    def pattern(self, b: Emitter, *operands: Value) -> Any:
        *rotated, rest = operands
        return b.concat(*_turned(b, *rotated), rest, axis=2)


class InterleavedRope(RopeRule):
    """Whole heads, pairs (2i, 2i + 1)."""

    name = "rope-interleaved"
    layout = "interleaved"
    operand_names: Sequence[str] = ("first", "second", "cos", "sin")

    def pattern(self, b: Emitter, *operands: Value) -> Any:
        columns = (b.reshape(part, shape=Var("column")) for part in _turned(b, *operands))
        return b.concat(*columns, axis=3)


class PartialInterleavedRope(InterleavedRope):
    """The first part of a head in pairs (2i, 2i + 1), the rest as it is."""

    name = "rope-interleaved-part"
    operand_names: Sequence[str] = ("first", "second", "cos", "sin", "rest")

    def pattern(self, b: Emitter, *operands: Value) -> Any:
        *rotated, rest = operands
        return b.concat(b.reshape(super().pattern(b, *rotated), shape=Var("joined")), rest, axis=2)
