"""The interpreter: a graph run op by op in float64. It is the oracle, so it shares no code with any kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph, Leaf, Param
from llmc.ir.op import Array, Value, run
from llmc.ir.types import Dim, Linear, Sym


@dataclass(frozen=True)
class Results:
    """Outputs by name and states' next values by state name."""

    outputs: dict[str, Array]
    states: dict[str, Array]


def interpret(
    graph: Graph,
    inputs: Mapping[str, Array],
    params: Mapping[str, Array] | Callable[[str], Array],
    states: Mapping[str, Array] | None = None,
) -> Results:
    """Run the graph. Arrays may have any dtype; floats are taken to float64, integers to int64. Parameters are asked
    for one by one, when a node needs them, and not kept: weights may stream through.

    Raises `LlmcError` naming an input or parameter that is missing or whose shape does not fit its type.
    """
    get_param = params if callable(params) else params.__getitem__

    def load(value: Value) -> Array:
        assert isinstance(value.op, Leaf)
        source = get_param if isinstance(value.op, Param) else {**inputs, **(states or {})}.__getitem__
        try:
            array = np.asarray(source(value.op.label))
        except KeyError:
            raise LlmcError(f"graph {graph.name}: no array was given for {value.op.label!r}: {value.type}") from None
        bind_symbols(graph, {value: array.shape}, sizes)
        return array.astype(value.type.dtype.oracle)

    sizes: dict[str, int] = {}
    values = {v: load(v) for v in (*graph.inputs, *graph.states) if v in graph.uses or v in graph.results}
    names = [name for name, _ in graph.outputs]
    arrays = run([*(v for _, v in graph.outputs), *graph.next_states], values, sizes, load)
    labels = [v.op.label for v in graph.states if isinstance(v.op, Leaf)]
    return Results(dict(zip(names, arrays, strict=False)), dict(zip(labels, arrays[len(names) :], strict=True)))


def bind_symbols(
    graph: Graph, shapes: Mapping[Value, tuple[int, ...]], sizes: dict[str, int] | None = None
) -> dict[str, int]:
    """The symbols' values, read off the arrays' shapes (added to `sizes`, with which they must agree)."""
    sizes = {} if sizes is None else sizes
    for value, shape in shapes.items():
        expected = value.type.shape
        fits = len(shape) == len(expected) and all(_bind(d, n, sizes) for d, n in zip(expected, shape, strict=True))
        if not fits:
            label = value.op.label if isinstance(value.op, Leaf) else value.op.name
            raise LlmcError(f"graph {graph.name}: {label!r} is {value.type}, given an array of shape {list(shape)}")
    return sizes


def _bind(dim: Dim, size: int, sizes: dict[str, int]) -> bool:
    if isinstance(dim, int):
        return dim == size
    if len(dim.terms) == 1 and isinstance(dim.terms[0][0], Sym):
        sym, coefficient = dim.terms[0]
        assert isinstance(sym, Sym)
        quotient, rest = divmod(size - dim.constant, coefficient)
        return rest == 0 and sizes.setdefault(sym.name, quotient) == quotient
    return isinstance(dim, Linear)


def evaluate_parameters(value: Value, load: Callable[[str], Array], kept: dict[Value, Array] | None = None) -> Array:
    """A value of the pack program, in its storage dtype (see `Op.pack`).

    Only the tensors that this value needs are loaded; nothing is kept, but in `kept`, if given, the other results of a
    node that has several (codes and their scales), until they are asked for in another call.
    """
    waiting: dict[Value, Array] = {} if kept is None else kept

    def visit(current: Value) -> Array:
        if isinstance(current.op, Leaf):
            return load(current.op.label)
        if current in waiting:
            return waiting.pop(current)
        node = current.node
        results = node.op.pack([v.type for v in node.inputs], node.types, [visit(v) for v in node.inputs])
        waiting.update((v, r) for v, r in zip(node.results, results, strict=True) if v != current)
        return results[current.index]

    return visit(value)
