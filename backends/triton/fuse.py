"""What follows a product or a norm elementwise becomes its end: a launch less, and a result less to write and read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isclose
from typing import TypeGuard

from llmc.backends.triton.ops import BlockLinear, RoundedNorm
from llmc.ir.graph import Graph, remake
from llmc.ir.op import Emitter, Node, Op, Value
from llmc.ir.ops.elementwise import Add, MulScalar, Tanh


def fuse_ends(graph: Graph) -> Graph:
    """Factors, soft caps and residual additions of a lowered graph, each as part of the op before it where nothing else
    reads what that makes."""
    return graph.map(_Ends(graph).emit)


class _Ends:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def emit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """What takes the node's place; `inputs` are its operands, fused already."""
        made = None
        if isinstance(node.op, MulScalar) and self._alone(node.inputs[0]):
            made = self._scaled(node.op.value, node.inputs[0], inputs[0])
        elif isinstance(node.op, Add):
            made = self._added(node.inputs, inputs) or self._added(node.inputs[::-1], inputs[::-1])
        return remake(node, inputs).results if made is None else (made,)

    def _scaled(self, value: float, before: Value, x: Value) -> Value | None:
        """A product's result times a factor, or its tanh times a cap."""
        if _ends(x.op):
            return _again(x, replace(x.op, factor=x.op.factor * value), *x.node.inputs)
        if not isinstance(x.op, Tanh) or value <= 0 or not self._alone(before.node.inputs[0]):
            return None
        (x,) = x.node.inputs
        if not _ends(x.op):
            return None
        factor = x.op.factor * value
        factor = 1.0 if isclose(factor, 1.0, rel_tol=1e-12) else factor
        return _again(x, replace(x.op, factor=factor, soft_cap=value), *x.node.inputs)

    def _added(self, before: Sequence[Value], inputs: Sequence[Value]) -> Value | None:
        """The result of a product or a norm, the first of `inputs`, and what is added to it."""
        x, other = inputs
        if not isinstance(x.op, BlockLinear | RoundedNorm) or x.type != other.type or not self._alone(before[0]):
            return None
        if not x.op.residual:
            return _again(x, replace(x.op, residual=True), *x.node.inputs, other)
        if before[0].op != x.op:  # the residual is an addition that this one follows
            return None
        first, theirs = x.node.inputs[-1], before[0].node.inputs[-1]
        if not _ends(first.op) or first.type != other.type or not self._alone(theirs):
            return None
        # (product + first) + other, as product + (first + other): the branches of a parallel layer.
        total = _again(first, replace(first.op, residual=True), *first.node.inputs, other)
        return _again(x, x.op, *x.node.inputs[:-1], total)

    def _alone(self, value: Value) -> bool:
        """Whether one operand of one node is all that reads a value of the graph."""
        return len(self.graph.uses.get(value, ())) == 1 and value not in self.graph.results


def _ends(op: Op) -> TypeGuard[BlockLinear]:
    """Whether an op is a product after which nothing but a factor comes yet."""
    return isinstance(op, BlockLinear) and not op.soft_cap and not op.residual


def _again(value: Value, op: Op, *operands: Value) -> Value:
    """The result of an op in the place of the one that made a value."""
    b = Emitter()
    b.loc = value.node.loc
    return b.one(op, *operands)
