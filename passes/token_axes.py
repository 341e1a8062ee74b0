"""Which axis of each value counts tokens, and that no op mixes tokens: what a ragged batch rests on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph, Param
from llmc.ir.op import Hole, Node, Op, Value, topological
from llmc.ir.ops.embedding import Embedding
from llmc.ir.ops.linear import Matmul
from llmc.ir.ops.quantized import DequantizeRows, DequantizeWeight, QuantizeRows
from llmc.ir.ops.reduce import Argmax, Reduction, SinkSoftmax, Softmax
from llmc.ir.ops.rope import DynamicFrequencies
from llmc.ir.ops.shape import Concat, Expand, Reshape, Slice, Transpose
from llmc.ir.types import Dim, product

Axis: TypeAlias = int | None
"""The axis that counts tokens, or None for a value that is the same for every token."""


class _Mixed(Exception):
    """A node makes one token's result depend on another's; the argument says how."""


def token_axes(graph: Graph, tokens: Dim, skip: Callable[[Op], bool]) -> dict[Value, Axis]:
    """The token axis of every value. Nodes that `skip` accepts mix tokens and are known to; their results are like
    their first operand.

    Raises `LlmcError` naming the first other node that mixes tokens or hides the tokens' axis.
    """
    axes: dict[Value, Axis] = {v: _leaf_axis(v, tokens) for v in (*graph.inputs, *graph.params)}
    for node in graph.nodes:
        operands = [axes.get(v) for v in node.inputs]
        try:
            results = [operands[0]] * len(node.types) if skip(node.op) else _results(node, operands, tokens)
        except _Mixed as mixed:
            raise LlmcError(
                f"{node!r} mixes tokens: {mixed}. Only attention may look at other tokens of its sequence, and this was"
                " not recognised as part of one (llmc opt --explain fuse-attention says why)"
            ) from None
        axes.update(zip(node.results, results, strict=True))
    return axes


def _leaf_axis(value: Value, tokens: Dim) -> Axis:
    places = [i for i, d in enumerate(value.type.shape) if d == tokens]
    return places[0] if places and not isinstance(value.op, Param) else None


def _results(node: Node, axes: Sequence[Axis], tokens: Dim) -> list[Axis]:
    """The token axes of a node's results, from those of its operands."""
    op = node.op
    if all(axis is None for axis in axes) and not isinstance(op, Expand):
        return [None] * len(node.types)
    for kind, rule in _RULES:
        if isinstance(op, kind):
            return [rule(node, axes, tokens)] * len(node.types)
    if op.elementwise and not op.decomposes:
        return [_aligned(node, axes, tokens)]
    if not op.decomposes:
        raise _Mixed(f"nothing is known about {op.name}")
    holes, results = op.expand([v.type for v in node.inputs])
    inner: dict[Value, Axis] = dict(zip(holes, axes, strict=True))
    for part in topological(v.node for v in results):
        if not isinstance(part.op, Hole):
            found = _results(part, [inner[v] for v in part.inputs], tokens)
            inner.update(zip(part.results, found, strict=True))
    return [inner[v] for v in results]


def _aligned(node: Node, axes: Sequence[Axis], tokens: Dim) -> Axis:
    """Operands that broadcast must have their tokens in one place, counted from the right."""
    rank = node.types[0].rank
    places = {axis + rank - v.type.rank for v, axis in zip(node.inputs, axes, strict=True) if axis is not None}
    if len(places) > 1:
        raise _Mixed(f"its operands {', '.join(str(v.type) for v in node.inputs)} pair each token with every other")
    return places.pop()


def _not_last(node: Node, axes: Sequence[Axis], tokens: Dim) -> Axis:
    axis = axes[0]
    if axis == node.inputs[0].type.rank - 1:
        raise _Mixed(f"it reduces {node.inputs[0].type} over the tokens")
    return axis


def _matmul(node: Node, axes: Sequence[Axis], tokens: Dim) -> Axis:
    x, y = node.inputs
    if axes[0] == x.type.rank - 1 or axes[1] == y.type.rank - 2:
        raise _Mixed("it sums over the tokens")
    if axes[0] == x.type.rank - 2 and axes[1] == y.type.rank - 1:
        raise _Mixed("it pairs each token with every other")
    return _aligned(node, axes, tokens)


def _reshape(node: Node, axes: Sequence[Axis], tokens: Dim) -> Axis:
    axis, before, after = axes[0], node.inputs[0].type.shape, node.types[0].shape
    assert axis is not None
    for i, dim in enumerate(after):
        if dim == tokens and product(after[:i]) == product(before[:axis]):
            return i
    raise _Mixed(f"it hides the tokens of {node.inputs[0].type} in {node.types[0]}")


def _transpose(node: Node, axes: Sequence[Axis], tokens: Dim) -> Axis:
    assert isinstance(node.op, Transpose) and axes[0] is not None
    return node.op.axes.index(axes[0])


def _slice(node: Node, axes: Sequence[Axis], tokens: Dim) -> Axis:
    if getattr(node.op, "axis", None) == axes[0]:
        raise _Mixed("it cuts or joins along the tokens")
    return axes[0]


def _concat(node: Node, axes: Sequence[Axis], tokens: Dim) -> Axis:
    places = set(axes)
    if len(places) > 1 or getattr(node.op, "axis", None) in places:
        raise _Mixed("it joins tokens with something else")
    return places.pop()


def _rows(node: Node, axes: Sequence[Axis], tokens: Dim) -> Axis:
    if set(axes) != {0}:
        raise _Mixed("its codes and scales are not rows of tokens")
    return 0


def _expand(node: Node, axes: Sequence[Axis], tokens: Dim) -> Axis:
    if axes[0] is not None:
        return axes[0] + node.types[0].rank - node.inputs[0].type.rank
    places = [i for i, d in enumerate(node.types[0].shape) if d == tokens]
    return places[0] if places else None


def _first(node: Node, axes: Sequence[Axis], tokens: Dim) -> Axis:
    if any(axis is not None for axis in axes[1:]):
        raise _Mixed("its table depends on tokens")
    return axes[0]


_RULES: tuple[tuple[type[Op], Callable[[Node, Sequence[Axis], Dim], Axis]], ...] = (
    (Embedding, _first),
    (DynamicFrequencies, _first),
    (Reduction, _not_last),
    (Softmax, _not_last),
    (SinkSoftmax, _not_last),
    (Argmax, _not_last),
    (Matmul, _matmul),
    (QuantizeRows, _not_last),
    (DequantizeRows, _rows),
    (DequantizeWeight, _rows),
    (Reshape, _reshape),
    (Transpose, _transpose),
    (Slice, _slice),
    (Concat, _concat),
    (Expand, _expand),
)
