"""Where a plan's values lie, under which numbers and names, and what launches over them cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph, Input, StateInput
from llmc.ir.op import Node, Value
from llmc.ir.ops.shape import Reshape
from llmc.passes.plan_memory import MemoryPlan, largest_bytes, storage


class Placed(Protocol):
    """What a lowered entry point says of its values' places; `base.Entry` is one."""

    @property
    def graph(self) -> Graph:
        """The lowered graph."""

    @property
    def memory(self) -> MemoryPlan:
        """The arena that intermediate values share."""

    @property
    def private(self) -> MemoryPlan:
        """What each task has of its own; empty on a GPU."""

    @property
    def arguments(self) -> Iterable[Value]:
        """Every value that a launch reads or writes, in order."""


def is_intermediate(value: Value, graph: Graph) -> bool:
    """Whether a stored value is an intermediate of the step: no leaf, no parameter, no output."""
    if value.op.leaf or value.node in graph.parameter_only:
        return False
    return value not in {storage(v) for _, v in graph.outputs}


class Buffers:
    """Numbers for kernels and buffers, shared by all entries of a package."""

    def __init__(self, placed: Mapping[str, tuple[int, int]], states: Mapping[str, int]) -> None:
        self.placed = placed
        self.states = states
        self.table: list[dict[str, Any]] = []
        self.kernels: list[str] = []
        self._known: dict[tuple[Any, ...], int] = {}

    def kernel(self, symbol: str) -> int:
        """The kernel's number."""
        if symbol not in self.kernels:
            self.kernels.append(symbol)
        return self.kernels.index(symbol)

    def index(self, value: Value, entry: Placed) -> int:
        """The number of the buffer that holds a value."""
        # A parameter is what its whole expression makes; what a step makes is where its views look.
        root = value if value.node in entry.graph.parameter_only else storage(value)
        op = root.op
        row: dict[str, Any]
        outputs = {storage(v): name for name, v in entry.graph.outputs}
        if isinstance(op, StateInput):
            row = {"kind": "state", "index": self.states[op.state.name]}
        elif isinstance(op, Input):
            row = {"kind": "input", "name": op.label}
        elif root in outputs:
            row = {"kind": "output", "name": outputs[root]}
        elif op.leaf or root.node in entry.graph.parameter_only:
            name = parameter_name(root)
            offset, size = self.placed[name]
            row = {"kind": "param", "name": name, "dtype": root.type.dtype.value, "offset": offset, "bytes": size}
        else:
            kind, memory = ("private", entry.private) if root in entry.private.offsets else ("arena", entry.memory)
            row = {"kind": kind, "offset": memory.offsets[root], "bytes": largest_bytes(root.type)}
        return self.number(row)

    def number(self, row: dict[str, Any]) -> int:
        """The number of a buffer that a plan describes so."""
        key = tuple(sorted(row.items()))
        if key not in self._known:
            self._known[key] = len(self.table)
            self.table.append(row)
        return self._known[key]


def parameters(entries: Sequence[Placed]) -> dict[str, Value]:
    """What the kernels read of the pack program, by name, in the order in which a step reads it."""
    found: dict[str, Value] = {}
    for entry in entries:
        for value in entry.arguments:
            if value.node in entry.graph.parameter_only or value in entry.graph.params:
                found.setdefault(parameter_name(value), value)
    return found


def parameter_name(value: Value) -> str:
    """A parameter-only value's name: the expression that makes it, so equal ones are stored once."""
    op = value.op
    if op.leaf:
        return str(getattr(op, "label", ""))
    name = f"{op.name}#{value.index}" if value.index else op.name
    fields = {k: v for k, v in vars(op).items() if k != "value"}
    data = getattr(op, "value", None)
    if data is not None and hasattr(data, "sha256"):
        return f"constant:{data.sha256[:16]}"
    attributes = ",".join(f"{k}={v}" for k, v in fields.items())
    return f"{name}{'{' + attributes + '}' if attributes else ''}({','.join(map(parameter_name, value.node.inputs))})"


def window_of(node: Node) -> int:
    """The window of an attention, in tokens; 0 for none, and for other nodes."""
    window: int = getattr(node.op, "window", 0)
    return window


def linear_cost(node: Node, what: str) -> tuple[int, int, int]:
    """(fixed, for each token, for each token of context) at batch 1, from three evaluations, all inside a window."""
    op = replace(node.op, window=0) if window_of(node) else node.op  # type: ignore[type-var]

    num_blocks = {s.name: 1 for v in node.inputs for s in v.type.symbols if s.name.startswith("num_blocks")}

    def at(tokens: int, blocks: int) -> int:
        sizes = {"tokens": tokens, "sequences": 1, "outputs": 1, "max_blocks": blocks, **num_blocks}
        cost = op.cost(*(v.type.substitute(dict(sizes)) for v in node.inputs))
        return int(getattr(cost, what))

    base, more_tokens, more_context = at(1, 1), at(2, 1), at(1, 2)
    token, block = more_tokens - base, more_context - base
    fixed = base - token - block
    # Work that is a product of tokens and context leaves a negative rest: it is the context's, at one token.
    return max(fixed, 0), token + min(fixed, 0), block // _block_size(node)


def _block_size(node: Node) -> int:
    for value in node.inputs:
        if isinstance(value.op, StateInput) or value.type.rank == 4:
            size = value.type.shape[-1]
            return size if isinstance(size, int) else 1
    return 1


def is_view(node: Node) -> bool:
    """Whether a node's result is its operand's memory, seen otherwise."""
    return isinstance(node.op, Reshape)


def bounds_of(graph: Graph, name: str) -> tuple[int, int]:
    """A symbol's bounds; where `sequences` was replaced, there are as many as tokens."""
    sym = graph.symbols.get(name) or graph.symbols["tokens"]
    if sym.max is None:
        raise LlmcError(f"symbol {name} of an entry point has no upper bound")
    return sym.min, sym.max
