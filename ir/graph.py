"""The graph: a pure SSA function of inputs, parameters and states."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import networkx as nx

from llmc.ir.errors import LlmcError, nearest
from llmc.ir.op import ConstantData, Node, Op, Value, topological
from llmc.ir.printer import layer_index, print_graph
from llmc.ir.types import Dim, DType, Linear, Shape, Sym, TensorType, substitute


@dataclass(frozen=True)
class State:
    """What outlives a step: a KV cache in pages, a recurrent slot. The compiler declares it, the runtime allocates it.

    `shape` begins with the symbolic number of blocks; `layer_group` names the layers that share a block table: `full`
    for those that see all of a sequence, `window_<n>` for those that see its last n tokens.
    """

    name: str
    kind: str
    dtype: DType
    shape: Shape
    layer_group: str = "full"

    @property
    def window(self) -> int:
        """How many tokens its layers see; 0 for all."""
        found = re.fullmatch(r"full|window_([1-9]\d*)", self.layer_group)
        if found is None:
            raise LlmcError(
                f"state {self.name!r}: the layer group is {self.layer_group!r}, expected 'full' or 'window_<tokens>'"
            )
        return int(found[1] or 0)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share a block table, as all see the last `window` tokens, or (0) every token, and what is theirs in a
    step: `num_blocks`, the symbol that counts the blocks of their states, and the names of two inputs."""

    window: int
    num_blocks: str
    slot_mapping: str
    block_tables: str

    @property
    def name(self) -> str:
        """As states have it."""
        return f"window_{self.window}" if self.window else "full"


def layer_groups(windows: Iterable[int]) -> tuple[LayerGroup, ...]:
    """The groups of layers with these windows: what sees everything first, then narrow windows before wide.

    The names of the first one's are plain, those of the others end in `_<group>`. Without any window there is `full`.
    """
    found: list[LayerGroup] = []
    for window in sorted(set(windows)) or [0]:
        suffix = f"_window_{window}" if found else ""
        found.append(LayerGroup(window, f"num_blocks{suffix}", f"slot_mapping{suffix}", f"block_tables{suffix}"))
    return tuple(found)


class Leaf(Op, abstract=True):
    """A value that comes from outside the graph; its node carries the type."""

    label: str
    leaf = True

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        raise LlmcError(f"{self.name} {self.label!r} carries its type; it is never inferred")


@dataclass(frozen=True)
class Input(Leaf):
    """A run-time input."""

    label: str


@dataclass(frozen=True)
class Param(Leaf):
    """A weight, known when the package is built."""

    label: str


@dataclass(frozen=True)
class StateInput(Leaf):
    """A state's value at the start of the step."""

    state: State

    @property
    def label(self) -> str:  # type: ignore[override]
        """The state's name."""
        return self.state.name


@dataclass(frozen=True, eq=False)
class Graph:
    """Inputs, parameters and states in; named outputs and the states' next values out.

    Dead code cannot be represented: the nodes are what outputs and next states reach.
    """

    name: str
    inputs: tuple[Value, ...]
    params: tuple[Value, ...]
    states: tuple[Value, ...]
    outputs: tuple[tuple[str, Value], ...]
    next_states: tuple[Value, ...] = ()

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All computing nodes (no leaves), operands first; what depends on no layer stands before the layers."""
        roots = (v.node for v in (*(v for _, v in self.outputs), *self.next_states))
        ordered = [n for n in topological(roots) if not isinstance(n.op, Leaf)]
        within: set[Node] = set()
        for node in ordered:
            if layer_index(node.loc) is not None or any(v.node in within for v in node.inputs):
                within.add(node)
        return (*(n for n in ordered if n not in within), *(n for n in ordered if n in within))

    @cached_property
    def uses(self) -> Mapping[Value, tuple[tuple[Node, int], ...]]:
        """For each value the nodes that read it, with the operand's index."""
        found: dict[Value, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for i, value in enumerate(node.inputs):
                found.setdefault(value, []).append((node, i))
        return {v: tuple(u) for v, u in found.items()}

    @cached_property
    def results(self) -> frozenset[Value]:
        """Values that leave the graph."""
        return frozenset((*(v for _, v in self.outputs), *self.next_states))

    @cached_property
    def symbols(self) -> Mapping[str, Sym]:
        """Every symbol by name, from leaves first."""
        found: dict[str, Sym] = {}
        types = [v.type for v in (*self.inputs, *self.params, *self.states)]
        types += [t for n in self.nodes for t in n.types]
        for t in types:
            for sym in t.symbols:
                if found.setdefault(sym.name, sym) != sym:
                    raise LlmcError(f"graph {self.name}: symbol {sym.name} has two sets of bounds")
        return dict(sorted(found.items()))

    @cached_property
    def constants(self) -> Mapping[str, ConstantData]:
        """Constant arrays by sha256."""
        found = {}
        for node in self.nodes:
            for f in fields(node.op):  # type: ignore[arg-type]
                value = getattr(node.op, f.name)
                if isinstance(value, ConstantData):
                    found[value.sha256] = value
        return found

    @cached_property
    def parameter_only(self) -> frozenset[Node]:
        """Nodes that depend on parameters and constants alone: the pack program, evaluated once at compile."""
        found: set[Node] = set()
        for node in self.nodes:
            if all(v.node in found or isinstance(v.op, Param) for v in node.inputs):
                found.add(node)
        return frozenset(found)

    @cached_property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The groups of layers that its states belong to."""
        return layer_groups(v.op.state.window for v in self.states if isinstance(v.op, StateInput))

    def leaf(self, label: str) -> Value:
        """The input, parameter or state of that name."""
        leaves = {v.op.label: v for v in (*self.inputs, *self.params, *self.states) if isinstance(v.op, Leaf)}
        if label not in leaves:
            raise LlmcError(f"graph {self.name} has no input, parameter or state {label!r}; {nearest(label, leaves)}")
        return leaves[label]

    def map(self, emit: Callable[[Node, tuple[Value, ...]], tuple[Value, ...]] | None = None, **changes: Any) -> Graph:
        """Rebuild in topological order: `emit(node, new operands)` gives the values that take the node's place.

        The default keeps the node. `changes` replaces fields of the graph, in the old graph's values.
        """
        source = replace(self, **changes) if changes else self
        new: dict[Value, Value] = {}
        for node in source.nodes:
            inputs = tuple(new.get(v, v) for v in node.inputs)
            values = emit(node, inputs) if emit else remake(node, inputs).results
            assert len(values) == len(node.types), f"{node!r} was replaced by {len(values)} values"
            new.update(zip(node.results, values, strict=True))
        return Graph(
            source.name,
            source.inputs,
            source.params,
            source.states,
            tuple((name, new.get(v, v)) for name, v in source.outputs),
            tuple(new.get(v, v) for v in source.next_states),
        )

    def substitute(self, values: Mapping[str, Dim]) -> Graph:
        """The same graph with symbols replaced, in types and attributes."""
        leaves: dict[Value, Value] = {}

        def leaf(value: Value) -> Value:
            op = value.op
            if isinstance(op, StateInput):
                shape = tuple(substitute(d, values) for d in op.state.shape)
                op = StateInput(replace(op.state, shape=shape))
            return leaves.setdefault(value, Value(Node(op, (), (value.type.substitute(values),), value.node.loc)))

        def renamed(value: Value) -> Value:
            return leaf(value) if isinstance(value.op, Leaf) else value

        def emit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
            op = substitute_attributes(node.op, values)
            operands = tuple(renamed(v) for v in inputs)
            return Node(op, operands, op.infer(*(v.type for v in operands)), node.loc).results

        mapped = self.map(emit)
        return Graph(
            self.name,
            tuple(map(leaf, self.inputs)),
            tuple(map(leaf, self.params)),
            tuple(map(leaf, self.states)),
            tuple((name, renamed(v)) for name, v in mapped.outputs),
            tuple(map(renamed, mapped.next_states)),
        )

    def to_networkx(self) -> nx.MultiDiGraph[Node]:
        """Nodes and their data edges, for what is a graph algorithm."""
        result: nx.MultiDiGraph[Node] = nx.MultiDiGraph()
        result.add_nodes_from(self.nodes)
        result.add_edges_from((v.node, n) for n in self.nodes for v in n.inputs if not isinstance(v.op, Leaf))
        return result

    def __str__(self) -> str:
        return print_graph(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return _shape_of(self) == _shape_of(other)

    __hash__ = object.__hash__


def remake(node: Node, inputs: tuple[Value, ...]) -> Node:
    """The node on other operands; itself when they are the same. Types are inferred again."""
    if inputs == node.inputs:
        return node
    return Node(node.op, inputs, node.op.infer(*(v.type for v in inputs)), node.loc)


def prune(graph: Graph, keep_inputs: Iterable[str] = ()) -> Graph:
    """Drop parameters and inputs that nothing reads (except the inputs named)."""
    used = set(graph.uses) | graph.results
    kept = set(keep_inputs)
    return replace(
        graph,
        inputs=tuple(v for v in graph.inputs if v in used or (isinstance(v.op, Leaf) and v.op.label in kept)),
        params=tuple(v for v in graph.params if v in used),
    )


def substitute_attributes(op: Op, values: Mapping[str, Dim]) -> Op:
    """The op with symbols replaced in attributes that are dimensions or shapes."""

    def walk(attribute: Any) -> Any:
        if isinstance(attribute, Linear):
            return substitute(attribute, values)
        return tuple(map(walk, attribute)) if isinstance(attribute, tuple) else attribute

    changed = {f.name: walk(getattr(op, f.name)) for f in fields(op)}  # type: ignore[arg-type]
    return type(op)(**changed)


def _shape_of(graph: Graph) -> tuple[Any, ...]:
    """Everything that equality compares, with values named by their place in topological order."""
    place: dict[Value, Any] = {}
    leaves = (*graph.inputs, *graph.params, *graph.states)
    for i, value in enumerate(leaves):
        place[value] = i
    nodes = []
    for i, node in enumerate(graph.nodes):
        nodes.append((node.op, tuple(place[v] for v in node.inputs), node.types, node.loc))
        place.update((v, (i, v.index)) for v in node.results)
    return (
        graph.name,
        tuple((v.op, v.type) for v in graph.inputs),
        tuple((v.op, v.type) for v in graph.params),
        tuple((v.op, v.type) for v in graph.states),
        nodes,
        tuple((name, place[v]) for name, v in graph.outputs),
        tuple(place[v] for v in graph.next_states),
    )
