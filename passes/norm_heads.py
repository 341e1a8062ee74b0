"""Norms of the queries and keys of a joint row, in one op: the row is taken apart and joined again nowhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.norm import LayerNorm, NormHeads, RmsNorm
from llmc.ir.ops.shape import Concat, Reshape, Slice
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule


@dataclass(frozen=True)
class _Normed:
    """Columns start..stop of a row, normalised in pieces of one width."""

    norm: RmsNorm | LayerNorm
    vectors: tuple[Value, ...]
    row: Value
    start: int
    stop: int
    width: int


class NormHeadsRule(Rule):
    """concat(norm(slice(row)), norm(slice(row)), slice(row)), where the slices follow each other and are all of it."""

    name = "norm-heads"
    roots = (Concat,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        if root.op != Concat(1) or len(root.inputs) != 3 or root.types[0].rank != 2:
            return NoMatch("want queries, keys and values side by side", root)
        query, key = (_normed(v) for v in root.inputs[:2])
        if query is None or key is None:
            missing = root.inputs[query is not None]
            return NoMatch(f"want a norm of columns of a row, found {missing.op.name}", missing.node, 1)
        rest = root.inputs[2]
        end = query.row.type.shape[1]
        if rest.op != Slice(1, key.stop, end) or not (query.row == key.row == rest.node.inputs[0]):  # type: ignore[arg-type]
            return NoMatch("queries, keys and values are not the columns of one row, in this order", root, 2)
        if (query.start, query.stop) != (0, key.start):
            return NoMatch("queries, keys and values are not the columns of one row, in this order", root, 2)
        if query.norm != key.norm:
            return NoMatch(f"queries and keys have different norms: {query.norm} and {key.norm}", root, 3)
        op = NormHeads(
            query.norm.eps,
            query.stop // query.width,
            query.width,
            (key.stop - key.start) // key.width,
            key.width,
            isinstance(query.norm, LayerNorm),
        )
        vectors = [v for both in zip(query.vectors, key.vectors, strict=True) for v in both]
        operands = {"row": query.row, **{f"vector{i}": v for i, v in enumerate(vectors)}}
        return Match(root, operands, {"op": op}, frozenset({root}), root.results)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        vectors = (match[f"vector{i}"] for i in range(len(match.operands) - 1))
        return b.one(match.attributes["op"], match["row"], *vectors)


def _normed(value: Value) -> _Normed | None:
    """What a norm of a slice of a row is, whatever shapes it goes through."""
    inner = value
    while isinstance(inner.op, Reshape):
        (inner,) = inner.node.inputs
    if not isinstance(inner.op, RmsNorm | LayerNorm):
        return None
    x, *vectors = inner.node.inputs
    width = x.type.shape[-1]
    while isinstance(x.op, Reshape):
        (x,) = x.node.inputs
    cut = x.op
    if not isinstance(cut, Slice) or cut.axis != 1 or cut.step != 1 or x.type.shape != value.type.shape:
        return None
    assert isinstance(width, int)
    return _Normed(inner.op, tuple(vectors), x.node.inputs[0], cut.start, cut.stop, width)
