"""What depends on constants alone is computed now; scalar constants become attributes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.ir.graph import Graph
from llmc.ir.op import ConstantData, Emitter, Node, Value
from llmc.ir.ops.elementwise import Add, AddScalar, Div, Mul, MulScalar, Sub
from llmc.ir.ops.shape import Constant
from llmc.ir.types import broadcast
from llmc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class ConstantFold(Pass):
    """Evaluates nodes whose operands are constants, up to `limit` elements in the result.

    x + c, x - c, x * c and x / c with a constant of one element (rank 0 or 1) become `add_scalar` and `mul_scalar`.
    Weights are no constants: the pack program evaluates what depends on them.
    """

    name = "constant-fold"
    tolerance = 1e-6  # a folded value is rounded to its dtype, which the float64 interpreter otherwise never does

    limit: int = 65536

    def run(self, graph: Graph, context: PassContext) -> Graph:
        def emit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            b = Emitter()
            b.loc = node.loc
            if self._foldable(node, inputs) and context.fire("constant-fold"):
                return _evaluated(b, node, inputs)
            scalar = _with_scalar(b, node, inputs)
            if scalar is not None and context.fire("scalar-constant"):
                return (scalar,)
            return node.results if inputs == node.inputs else b.make(node.op, inputs).results

        return graph.map(emit)

    def _foldable(self, node: Node, inputs: tuple[Value, ...]) -> bool:
        if not inputs or not all(isinstance(v.op, Constant) for v in inputs):
            return False
        return not any(t.symbols for t in node.types) and sum(t.elements for t in node.types) <= self.limit


def _evaluated(b: Emitter, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
    arrays = [v.op.reference()[0] for v in inputs]
    results = node.op.evaluate([v.type for v in inputs], arrays, {})
    return tuple(
        b(Constant(t.dtype, ConstantData(t.dtype.store(np.asarray(r)))))
        for r, t in zip(results, node.types, strict=True)
    )


def _with_scalar(b: Emitter, node: Node, inputs: tuple[Value, ...]) -> Value | None:
    """The node with its one-element constant as an attribute."""
    op = node.op
    if not isinstance(op, Add | Sub | Mul | Div):
        return None
    x, c = inputs
    if op.commutative and _scalar(x) is not None:
        x, c = c, x
    value = _scalar(c)
    if value is None or broadcast(x.type.shape, c.type.shape) != x.type.shape or not x.type.dtype.is_float:
        return None
    match op:
        case Add():
            return b.one(AddScalar(value), x)
        case Sub():
            return b.one(AddScalar(-value), x)
        case Mul():
            return b.one(MulScalar(value), x)
        case _ if value != 0:
            return b.one(MulScalar(1.0 / value), x)
    return None


def _scalar(value: Value) -> float | None:
    """The number, if the value is one; a table that happens to have one column ([1, 1]) is none."""
    if not isinstance(value.op, Constant) or value.type.rank > 1 or value.op.value.array.size != 1:
        return None
    return float(value.op.value.array.reshape(()))
