"""A linear whose columns are taken apart in groups becomes linears of their own: the weight is sorted, not each result.

Joint projections often give each key head its queries, its key and its value one after the other. Sorting the weight's
rows costs nothing at run time, and `pack-linears` puts what is split here together again, in the order of use.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.linear import Linear
from llmc.ir.ops.shape import Reshape, Slice
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.ir.types import Shape
from llmc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class SplitLinears(Pass):
    """slice(reshape(linear(x, W)), axis), for slices that cover the axis, become linears with those rows of W."""

    name = "split-linears"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return context.rewrite(graph, Split())


class Split(Rule):
    """A linear that is only read in one shape [t, .., width], of which only slices along one axis between the two are
    read: whole heads."""

    name = "split-linears"
    roots = (Linear,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        op = root.op
        assert isinstance(op, Linear)
        if op.activation != "none" or op.residual:
            return NoMatch("the linear has an activation or a residual", root)
        readers = [n for n, _ in graph.uses.get(root.results[0], ())]
        if len(readers) != 1 or not isinstance(readers[0].op, Reshape):
            return NoMatch("want one reader, a reshape", root)
        (view,) = readers
        shape = view.types[0].shape
        if shape[0] != root.types[0].shape[0]:
            return NoMatch(f"the reshape to {view.types[0]} does not keep the rows", view, 1)
        slices = [n for n, _ in graph.uses.get(view.results[0], ())]
        parts = [n.op for n in slices if isinstance(n.op, Slice)]
        if len(parts) < len(slices) or len({(p.axis, p.step) for p in parts}) != 1:
            return NoMatch("want slices along one axis as readers of the reshape", view, 2)
        axis = parts[0].axis
        if axis == len(shape) - 1:
            return NoMatch("the slices are parts of heads, as a rotation takes them", view, 3)
        ranges = sorted((p.start, p.stop) for p in parts)
        whole = ranges[0][0] == 0 and ranges[-1][1] == shape[axis] and all(a[1] == b[0] for a, b in pairwise(ranges))
        if parts[0].step != 1 or axis == 0 or not whole:
            return NoMatch(
                f"want slices that cover an axis behind the rows, found {', '.join(map(str, parts))}", view, 3
            )
        operands = {"x": root.inputs[0], **{f"rows{i}": v for i, v in enumerate(root.inputs[1:])}}
        attributes = {"shape": shape[1:], "parts": parts}
        replaced = tuple(n.results[0] for n in slices)
        return Match(root, operands, attributes, frozenset({root, view, *slices}), replaced)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        shape: Shape = match.attributes["shape"]
        made = []
        for part, old in zip(match.attributes["parts"], match.replaced, strict=True):
            arrays = [match[f"rows{i}"] for i in range(len(match.root.inputs) - 1)]
            rows = [_rows(b, array, shape, part) for array in arrays]
            made.append(b.reshape(b.one(match.root.op, match["x"], *rows), shape=old.type.shape))
        return tuple(made)


def _rows(b: Emitter, array: Value, shape: Shape, part: Slice) -> Value:
    """The rows [n, ..] of a weight or a bias that make the columns of a slice; columns have the given shape."""
    rest = array.type.shape[1:]
    pieces = b.slice(b.reshape(array, shape=(*shape, *rest)), axis=part.axis - 1, start=part.start, stop=part.stop)
    sizes = [d for d in pieces.type.shape[: len(shape)] if isinstance(d, int)]
    result: Value = b.reshape(pieces, shape=(prod(sizes), *rest))
    return result
