"""Linears of one input become one, over the concatenated weights: one pass over x, one launch, longer rows of work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.linear import Linear
from llmc.ir.ops.routing import Routing
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.passes.base import Pass, PassContext, common_place


@dataclass(frozen=True)
class PackLinears(Pass):
    """linear(x, A), linear(x, B), … become slices of linear(x, concat(A, B, …)), in order of first use."""

    name = "pack-linears"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return context.rewrite(graph, Pack())


class Pack(Rule):
    """All linears of one input that have neither activation nor residual, and the same dtypes and bias-ness; the last
    is the root. One that a routing reads stays by itself: it keeps its dtype where others are quantized."""

    name = "pack-linears"
    roots = (Linear,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        if not _packable(root):
            return NoMatch("the linear has an activation or a residual", root)
        if _routes(root, graph):
            return NoMatch("a routing reads the linear", root)
        readers = list(dict.fromkeys(n for n, i in graph.uses[root.inputs[0]] if i == 0 and isinstance(n.op, Linear)))
        if len(readers) == 1:
            return NoMatch("no other linear reads its input", root)
        group = [n for n in readers if _packable(n) and _kind(n) == _kind(root) and not _routes(n, graph)]
        if len(group) == 1:
            other = next(n for n in readers if n is not root)
            kind = f"has weights of another kind, {_kind(other)}"
            why = kind if _packable(other) else "has an activation or a residual"
            why = "a routing reads that" if _routes(other, graph) else why
            return NoMatch(f"another linear reads its input, but {why}", other, 1)
        if root is not group[-1]:
            return NoMatch("it is packed with a linear further on", root)
        operands = {"x": root.inputs[0]}
        for i, node in enumerate(group):
            operands |= {f"{'wb'[k]}{i}": v for k, v in enumerate(node.inputs[1:])}
        return Match(
            root,
            operands,
            {"count": len(group), "place": common_place(n.loc for n in group)},
            frozenset(group),
            tuple(n.results[0] for n in group),
        )

    def rewrite(self, b: Emitter, match: Match) -> Any:
        b.loc = match.attributes["place"]
        count = match.attributes["count"]
        weights = [match[f"w{i}"] for i in range(count)]
        biases = [match[f"b{i}"] for i in range(count) if f"b{i}" in match.operands]
        joined = [b.concat(*parts, axis=0) for parts in (weights, biases) if parts]
        y = b.linear(match["x"], *joined, bias=bool(biases))
        edges = [0]
        for weight in weights:
            edges.append(edges[-1] + _rows(weight))
        return tuple(b.slice(y, axis=1, start=edges[i], stop=edges[i + 1]) for i in range(count))


def _packable(node: Node) -> bool:
    return isinstance(node.op, Linear) and node.op.activation == "none" and not node.op.residual


def _routes(node: Node, graph: Graph) -> bool:
    return any(isinstance(reader.op, Routing) for reader, _ in graph.uses.get(node.results[0], ()))


def _kind(node: Node) -> tuple[str, ...]:
    """The dtypes of weight and bias."""
    return tuple(v.type.dtype.value for v in node.inputs[1:])


def _rows(weight: Value) -> int:
    rows = weight.type.shape[0]
    assert isinstance(rows, int)
    return rows
