"""The unit batch axis of exported models is dropped: a graph is a function of one sequence, tokens first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Op, Value
from llmc.ir.ops.linear import Matmul
from llmc.ir.ops.reduce import Reduction, Softmax
from llmc.ir.ops.shape import Concat, Expand, Reshape, Slice, Transpose
from llmc.ir.types import Linear, Shape
from llmc.passes.base import Pass, PassContext
from llmc.passes.views import reshaped


@dataclass(frozen=True)
class DropUnitAxes(Pass):
    """An axis of size 1 that is put before the tokens is left out of every op that only carries it along.

    It begins where a value [tokens, ...] is read as [1, ...] of rank 3 or more, or one [heads, tokens, ...] as
    [1, heads, tokens, ...], and ends where it is reshaped away or at an op that does more with it.
    """

    name = "drop-unit-axes"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        narrow: dict[Value, Value] = {}
        """For each value with the axis, the same without it."""

        def emit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            b = Emitter()
            b.loc = node.loc
            made = _narrowed(b, node, inputs, narrow)
            if made is None or not context.fire("unit-axis"):
                return node.results if inputs == node.inputs else b.make(node.op, inputs).results
            wide = reshaped(b, made, node.types[0].shape)
            if wide.type.shape[0] == 1 and wide.type.shape[1:] == made.type.shape:
                narrow[wide] = made
            return (wide,)

        return graph.map(emit)


def _narrowed(b: Emitter, node: Node, inputs: tuple[Value, ...], narrow: dict[Value, Value]) -> Value | None:
    """The node's result without its first axis, or reshaped to where that axis is gone; None where it must stay."""
    op, shape = node.op, node.types[0].shape
    carried = [v for v in inputs if v in narrow]
    if isinstance(op, Reshape):
        if carried:
            return reshaped(b, narrow[inputs[0]], shape[1:] if _leads_with_unit(node) else shape)
        return reshaped(b, inputs[0], shape[1:]) if _leads_with_unit(node) and _begins(inputs[0], shape) else None
    without = _without_axis(op, node) if carried and _leads_with_unit(node) else None
    if without is None:
        return None
    operands = []
    for value in inputs:
        if value.type.rank == len(shape):
            value = narrow.get(value) or reshaped(b, value, value.type.shape[1:])
        operands.append(value)
    return b.one(without, *operands)


def _begins(value: Value, shape: Shape) -> bool:
    """Whether a reshape puts the axis before the tokens, or before an axis of several heads of all tokens."""
    given = value.type.shape
    if given and isinstance(given[0], Linear):
        return True
    return shape[1:] == given and given[0] != 1 and any(isinstance(d, Linear) for d in given)


def _leads_with_unit(node: Node) -> bool:
    """Whether the result is [1, ...] of rank 3 or more, made of values that all have that axis or fewer axes."""
    rank = node.types[0].rank
    wide = [v for v in node.inputs if v.type.rank == rank] if not isinstance(node.op, Reshape) else []
    return rank > 2 and node.types[0].shape[0] == 1 and all(v.type.shape[0] == 1 for v in wide)


def _without_axis(op: Op, node: Node) -> Op | None:
    """The op on values that lack the first axis."""
    if op.elementwise or isinstance(op, Softmax | Reduction | Matmul):
        return op
    if isinstance(op, Transpose) and op.axes[0] == 0:
        return Transpose(tuple(a - 1 for a in op.axes[1:]))
    if isinstance(op, Slice | Concat) and op.axis > 0:
        return replace(op, axis=op.axis - 1)
    if isinstance(op, Expand) and node.inputs[0].type.rank <= len(op.shape):
        return Expand(op.shape[1:])
    return None
