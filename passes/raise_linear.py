"""A product with a matrix of weights, written as a `linear` with its weight as it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph, Param
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.elementwise import Add, Cast
from llmc.ir.ops.linear import Linear, Matmul
from llmc.ir.ops.shape import Transpose
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.ir.types import DType
from llmc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class RaiseLinear(Pass):
    """matmul(x, f(W)) becomes linear(x, W), where f is casts and transposes; then a bias added to it goes inside.

    A weight stored [in, out] is transposed by the pack program.
    """

    name = "raise-linear"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return context.rewrite(context.rewrite(graph, MatmulToLinear()), AddBias())


class MatmulToLinear(Rule):
    """matmul of [m, k] by a [k, n] that is made of parameters."""

    name = "linear"
    roots = (Matmul,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        x, matrix = root.inputs
        if not _is_weight(matrix, graph):
            return NoMatch("the right operand does not depend on parameters alone", root)
        if matrix.type.rank != 2:
            return NoMatch(f"the weight {matrix.type} is no matrix", root, 1)
        if x.type.rank != 2:
            return NoMatch(f"the left operand is {x.type}; a linear takes [rows, features]", root, 1)
        return Match(root, {"x": x, "matrix": matrix}, {}, frozenset([root]), root.results)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        weight, transposed = _stored(match["matrix"])
        return b.linear(match["x"], weight if transposed else b.transpose(weight, axes=(1, 0)))


class AddBias(Rule):
    """linear(x, W) plus a vector of parameters."""

    name = "linear-bias"
    roots = (Add,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        refusal = NoMatch("neither operand is a linear", root)
        for y, bias in (root.inputs, root.inputs[::-1]):
            if not isinstance(y.op, Linear):
                continue
            if y.op != Linear():
                refusal = NoMatch("the linear has a bias or an activation already", root, 1)
            elif not _is_weight(bias, graph) or bias.type.rank != 1:
                refusal = NoMatch(f"what is added, {bias.type}, is no vector of parameters", root, 1)
            else:
                x, weight = y.node.inputs
                nodes = frozenset([root, y.node])
                return Match(root, {"x": x, "weight": weight, "bias": bias}, {}, nodes, root.results)
        return refusal

    def rewrite(self, b: Emitter, match: Match) -> Any:
        bias = match["bias"]
        if isinstance(bias.op, Cast) and _stored_float(bias):
            bias = bias.node.inputs[0]
        return b.linear(match["x"], match["weight"], bias, bias=True)


def _is_weight(value: Value, graph: Graph) -> bool:
    return isinstance(value.op, Param) or value.node in graph.parameter_only


def _stored(matrix: Value) -> tuple[Value, bool]:
    """The weight behind transposes and the last cast (a linear casts its weight itself); whether it is transposed."""
    transposed, cast = False, False
    while True:
        if isinstance(matrix.op, Transpose):
            transposed ^= matrix.op.axes == (1, 0)
        elif isinstance(matrix.op, Cast) and not cast and _stored_float(matrix):
            cast = True
        else:
            return matrix, transposed
        matrix = matrix.node.inputs[0]


def _stored_float(cast: Value) -> bool:
    """Whether what is cast is as a checkpoint stores it: `linear` then casts it alike."""
    return cast.node.inputs[0].type.dtype in (DType.F32, DType.F16, DType.BF16)
