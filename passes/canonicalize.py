"""One way to write each thing: what computes nothing is dropped, chains are composed, equal nodes are merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from llmc.ir.graph import Graph, prune
from llmc.ir.op import Emitter, Node, Op, Value
from llmc.ir.ops.elementwise import Add, AddScalar, Cast, Mul, MulScalar, Neg, PowScalar, Rsqrt, Sub
from llmc.ir.ops.shape import Concat, Expand, Reshape, Slice, Transpose
from llmc.ir.types import DType
from llmc.passes.base import Pass, PassContext, common_place

Simplify: TypeAlias = Callable[[Emitter, Any, tuple[Value, ...]], Value | None]


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Drops identities, composes casts, reshapes, transposes and slices, merges common subexpressions.

    Nodes merged from several layers stand at the place that the layers share.
    """

    name = "canonicalize"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        known: dict[Any, Node] = {}
        order: dict[Value, int] = {}
        kept: set[Node] = set()
        places = {} if context.budget.spent else _shared_places(graph)

        def emit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            b = Emitter()
            b.loc = places.get(node, node.loc)
            value = _simplified(b, node.op, inputs, context)
            if value is None:
                return merged(node if (inputs, b.loc) == (node.inputs, node.loc) else b.make(node.op, inputs)).results
            return (value if value.node in kept or value.op.leaf else merged(value.node).results[value.index],)

        def merged(node: Node) -> Node:
            """The node, or the equal one that is there already."""
            numbers = [order.setdefault(v, len(order)) for v in node.inputs]
            key = (node.op, tuple(sorted(numbers) if node.op.commutative else numbers))
            if key in known and context.fire("common-subexpression"):
                return known[key]
            kept.add(node)
            known.setdefault(key, node)
            return node

        return prune(graph.map(emit), keep_inputs=[str(getattr(v.op, "label", "")) for v in graph.inputs])


def _simplified(b: Emitter, op: Op, inputs: tuple[Value, ...], context: PassContext) -> Value | None:
    """The value that replaces op(inputs), simplified as far as it goes; None where it is simple already."""
    result: Value | None = None
    while (rule := _RULES.get(type(op))) is not None:
        simpler = rule(b, op, inputs)
        if simpler is None or not context.fire(op.name.replace("_", "-")):
            break
        result, op, inputs = simpler, simpler.op, simpler.node.inputs
    return result


def _shared_places(graph: Graph) -> dict[Node, str]:
    """Where a node will stand that equals nodes of other layers: what it is made of is compared, not how it is called.

    Nodes that compute the same from the same leaves get the dotted prefix that all their places share.
    """
    classes: dict[Value, int] = {}
    members: dict[int, list[Node]] = {}
    keys: dict[Any, int] = {}
    for node in graph.nodes:
        operands = [classes.setdefault(v, -1 - len(classes)) for v in node.inputs]
        key = (node.op, tuple(sorted(operands) if node.op.commutative else operands))
        number = keys.setdefault(key, len(keys))
        members.setdefault(number, []).append(node)
        classes.update((v, number * 8 + v.index) for v in node.results)
    return {
        node: common_place(n.loc for n in nodes)
        for nodes in members.values()
        if len({n.loc for n in nodes}) > 1
        for node in nodes
    }


def _cast(b: Emitter, op: Cast, inputs: tuple[Value, ...]) -> Value | None:
    (x,) = inputs
    if x.type.dtype is op.dtype:
        return x
    if isinstance(x.op, Cast) and _holds(x.op.dtype, x.node.inputs[0].type.dtype):
        inner = x.node.inputs[0]
        return inner if inner.type.dtype is op.dtype else b.one(op, inner)
    return None


def _holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of `narrow` is one of `wide`, so that a cast there and on loses nothing."""
    exact = {
        DType.F64: (DType.F32, DType.F16, DType.BF16, DType.F8E4M3, DType.I32, DType.I8, DType.U8),
        DType.F32: (DType.F16, DType.BF16, DType.F8E4M3, DType.I8, DType.U8),
        DType.F16: (DType.F8E4M3,),
        DType.BF16: (DType.F8E4M3,),
        DType.I64: (DType.I32, DType.I8, DType.U8),
        DType.I32: (DType.I8, DType.U8),
    }
    return wide is narrow or narrow in exact.get(wide, ())


def _reshape(b: Emitter, op: Reshape, inputs: tuple[Value, ...]) -> Value | None:
    (x,) = inputs
    if x.type.shape == op.shape:
        return x
    return b.one(op, x.node.inputs[0]) if isinstance(x.op, Reshape) else None


def _transpose(b: Emitter, op: Transpose, inputs: tuple[Value, ...]) -> Value | None:
    (x,) = inputs
    if op.axes == tuple(range(x.type.rank)):
        return x
    if isinstance(x.op, Transpose):
        return b.one(Transpose(tuple(x.op.axes[a] for a in op.axes)), x.node.inputs[0])
    return None


def _slice(b: Emitter, op: Slice, inputs: tuple[Value, ...]) -> Value | None:
    (x,) = inputs
    if (op.start, op.stop, op.step) == (0, x.type.shape[op.axis], 1):
        return x
    if isinstance(x.op, Slice) and x.op.axis == op.axis and x.op.step == 1:
        first = x.op.start
        return b.one(replace(op, start=first + op.start, stop=first + op.stop), x.node.inputs[0])
    if isinstance(x.op, Concat) and x.op.axis == op.axis and op.step == 1:
        return _slice_of_concat(b, op, x.node.inputs)
    return None


def _slice_of_concat(b: Emitter, op: Slice, parts: tuple[Value, ...]) -> Value | None:
    """The part that holds the whole range, or the slice of it."""
    at = 0
    for part in parts:
        size = part.type.shape[op.axis]
        if not isinstance(size, int):
            return None
        if at <= op.start and op.stop <= at + size:
            if op.stop - op.start == size:
                return part
            return b.one(replace(op, start=op.start - at, stop=op.stop - at), part)
        at += size
    return None


def _concat(b: Emitter, op: Concat, inputs: tuple[Value, ...]) -> Value | None:
    """A single part is itself; adjacent slices of one value are one slice of it."""
    if len(inputs) == 1:
        return inputs[0]
    pieces: list[Value] = []
    for value in inputs:
        last = pieces[-1] if pieces else None
        if last is not None and (whole := _joined(b, last, value, op.axis)) is not None:
            pieces[-1] = whole
        else:
            pieces.append(value)
    if len(pieces) == len(inputs):
        return None
    return pieces[0] if len(pieces) == 1 else b.one(op, *pieces)


def _joined(b: Emitter, first: Value, second: Value, axis: int) -> Value | None:
    """Two adjacent slices of one value as one slice."""
    x, y = first.op, second.op
    if not (isinstance(x, Slice) and isinstance(y, Slice) and x.axis == y.axis == axis and x.step == y.step == 1):
        return None
    if first.node.inputs != second.node.inputs or x.stop != y.start:
        return None
    return b.one(replace(x, stop=y.stop), *first.node.inputs)


def _expand(b: Emitter, op: Expand, inputs: tuple[Value, ...]) -> Value | None:
    return inputs[0] if inputs[0].type.shape == op.shape else None


def _mul_scalar(b: Emitter, op: MulScalar, inputs: tuple[Value, ...]) -> Value | None:
    return inputs[0] if op.value == 1.0 else None


def _add_scalar(b: Emitter, op: AddScalar, inputs: tuple[Value, ...]) -> Value | None:
    return inputs[0] if op.value == 0.0 else None


def _pow_scalar(b: Emitter, op: PowScalar, inputs: tuple[Value, ...]) -> Value | None:
    (x,) = inputs
    if op.exponent == 1.0:
        return x
    if op.exponent == 2.0:
        return b.one(Mul(), x, x)
    if op.exponent == -0.5:
        return b.one(Rsqrt(), x)
    return None


def _add(b: Emitter, op: Add, inputs: tuple[Value, ...]) -> Value | None:
    x, y = inputs
    if isinstance(y.op, Neg):
        return b.one(Sub(), x, y.node.inputs[0])
    if isinstance(x.op, Neg):
        return b.one(Sub(), y, x.node.inputs[0])
    return None


def _sub(b: Emitter, op: Sub, inputs: tuple[Value, ...]) -> Value | None:
    x, y = inputs
    return b.one(Add(), x, y.node.inputs[0]) if isinstance(y.op, Neg) else None


def _neg(b: Emitter, op: Neg, inputs: tuple[Value, ...]) -> Value | None:
    (x,) = inputs
    return x.node.inputs[0] if isinstance(x.op, Neg) else None


def _mul(b: Emitter, op: Mul, inputs: tuple[Value, ...]) -> Value | None:
    x, y = inputs
    if isinstance(x.op, Neg) and isinstance(y.op, Neg):
        return b.one(op, x.node.inputs[0], y.node.inputs[0])
    return None


_RULES: dict[type[Op], Simplify] = {
    Cast: _cast,
    Reshape: _reshape,
    Transpose: _transpose,
    Slice: _slice,
    Concat: _concat,
    Expand: _expand,
    MulScalar: _mul_scalar,
    AddScalar: _add_scalar,
    PowScalar: _pow_scalar,
    Add: _add,
    Sub: _sub,
    Neg: _neg,
    Mul: _mul,
}
