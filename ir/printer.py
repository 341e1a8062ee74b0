"""The text form of a graph, written. `text.py` reads it back; repeated layers are folded into one `repeat` body."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from llmc.ir.op import ConstantData, Node, Op, Value
from llmc.ir.types import DType, Linear, Sym, TensorType

_INDEX = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")
LAYER = "{layer}"
INLINE = 16
"""Constants of at most so many elements are written out; larger ones are named by sha256."""


class Printable(Protocol):
    """What the printer reads of a graph."""

    @property
    def name(self) -> str:
        """The graph's name."""

    @property
    def inputs(self) -> tuple[Value, ...]:
        """Run-time inputs."""

    @property
    def params(self) -> tuple[Value, ...]:
        """Weights."""

    @property
    def states(self) -> tuple[Value, ...]:
        """States at the start."""

    @property
    def outputs(self) -> tuple[tuple[str, Value], ...]:
        """Named results."""

    @property
    def next_states(self) -> tuple[Value, ...]:
        """States at the end, in the order of `states`."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Computing nodes, operands first."""

    @property
    def symbols(self) -> Mapping[str, Sym]:
        """Symbols by name."""


def print_graph(graph: Printable, fold: bool = True) -> str:
    """The graph as text. With `fold`, consecutive layers of one structure are written once."""
    return "\n".join(_Printer(graph, fold).lines()) + "\n"


def attribute_text(value: Any) -> str:
    """One attribute's value, as the parser reads it."""
    if isinstance(value, DType | Linear):
        return str(value)
    if isinstance(value, ConstantData):
        return _inline(value) or f'sha256("{value.sha256}")'
    if isinstance(value, tuple):
        return f"[{', '.join(map(attribute_text, value))}]"
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return repr(value)


def _inline(data: ConstantData) -> str | None:
    """A small array of finite numbers, written out so that reading it gives the same bytes; None for any other."""
    array = data.array
    if not 0 < array.size <= INLINE or not np.isfinite(array.astype(np.float64)).all():
        return None

    def item(number: Any) -> str:
        if array.dtype.kind in "iub":
            return repr(number.item())
        short = str(number)
        return short if array.dtype.type(float(short)) == number and "." in short else repr(float(number))

    def nested(part: Any) -> str:
        return f"[{', '.join(map(nested, part))}]" if part.ndim else item(part[()])

    return nested(array)


def op_text(op: Op) -> tuple[str, str]:
    """An op's name and its attributes in braces; attributes at their default are left out."""
    shown = []
    for f in fields(op):  # type: ignore[arg-type]
        value = getattr(op, f.name)
        if f.default is MISSING or f.default != value:
            shown.append(f"{f.name}={attribute_text(value)}")
    return op.name, f" {{{', '.join(shown)}}}" if shown else ""


def layer_index(name: str) -> int | None:
    """The first whole number among a dotted name's parts: which layer it belongs to."""
    found = _INDEX.search(name)
    return int(found.group()) if found else None


def layer_template(name: str, index: int | None) -> str:
    """The dotted name with its layer number replaced by `{layer}`."""
    return name if index is None or layer_index(name) != index else _INDEX.sub(LAYER, name, count=1)


def is_leaf(value: Value) -> bool:
    """Whether the value is an input, parameter or state."""
    return value.op.name in _SIGIL


_SIGIL = {"input": "%", "param": "$", "state_input": "&"}


def _leaf_name(value: Value, index: int | None = None) -> str:
    label: str = value.op.label  # type: ignore[attr-defined]
    return _SIGIL[value.op.name] + layer_template(label, index)


@dataclass(frozen=True)
class _Fold:
    """A run of groups that fold: their count, and the carried values as (initial, place in the group, result)."""

    count: int
    carries: tuple[tuple[Value, int, int], ...]


class _Printer:
    def __init__(self, graph: Printable, fold: bool) -> None:
        self.graph = graph
        self.fold = fold
        self.names: dict[Value, str] = {}
        self.count = 0
        self.next_names: dict[Value, list[Value]] = {}
        for state, value in zip(graph.states, graph.next_states, strict=True):
            if value != state:
                self.next_names.setdefault(value, []).append(state)
        self.readers: dict[Value, list[Node]] = {}
        for node in graph.nodes:
            for value in node.inputs:
                self.readers.setdefault(value, []).append(node)
        self.outputs = {v for _, v in graph.outputs}

    def lines(self) -> list[str]:
        graph = self.graph
        result = [f"graph {graph.name} {{"]
        for sym in graph.symbols.values():
            multiple = f" multiple {sym.multiple_of}" if sym.multiple_of != 1 else ""
            result.append(f"  symbol {sym.name} = {sym.min}..{'' if sym.max is None else sym.max}{multiple}")
        result += self._leaves(graph.inputs, lambda v, i: f"input {_leaf_name(v, i)}: {v.type}")
        result += self._leaves(graph.params, lambda v, i: f"param {_leaf_name(v, i)}: {v.type}")
        result += self._leaves(graph.states, _state_line)
        result += self._body()
        outputs = ", ".join(f"{name}={self._name(v)}" for name, v in graph.outputs)
        return [*result, f"  return {outputs}", "}"]

    def _leaves(self, leaves: Sequence[Value], line: Callable[[Value, int | None], str]) -> list[str]:
        labels: list[str] = [v.op.label for v in leaves]  # type: ignore[attr-defined]
        groups = _runs([layer_index(label) for label in labels])
        result: list[str] = []
        at = 0
        while at < len(groups):
            start, stop, index = groups[at]
            templates = [line(v, index) for v in leaves[start:stop]]
            count = 1
            while self.fold and index is not None and at + count < len(groups):
                first, last, following = groups[at + count]
                if following != index + count or [line(v, following) for v in leaves[first:last]] != templates:
                    break
                count += 1
            if count > 1 and index is not None:
                result.append(f"  repeat layer = {index}..{index + count - 1} {{")
                result += [f"    {t}" for t in templates]
                result.append("  }")
            else:
                result += [f"  {line(v, None)}" for v in leaves[start:stop]]
            at += count
        return result

    def _body(self) -> list[str]:
        nodes = self.graph.nodes
        groups = _runs([layer_index(n.loc) for n in nodes])
        result: list[str] = []
        at = 0
        while at < len(groups):
            found = self._foldable(groups[at:]) if self.fold else None
            start, stop, index = groups[at]
            if found is None or index is None:
                for node in nodes[start:stop]:
                    result += self._node(node, None, "  ")
                at += 1
            else:
                result += self._repeat(groups[at : at + found.count], index, found)
                at += found.count
        return result

    def _node(self, node: Node, index: int | None, indent: str) -> list[str]:
        name, attributes = op_text(node.op)
        operands = ", ".join(self._name(v, index) for v in node.inputs)
        targets = ", ".join(self._define(v) for v in node.results)
        loc = f" @{layer_template(node.loc, index)}" if node.loc else ""
        types = "; ".join(map(str, node.types))
        lines = [f"{indent}{targets} = {name}({operands}){attributes} : {types}{loc}"]
        for value in node.results:
            lines += [
                f"{indent}next {_leaf_name(s, index)} = {self.names[value]}" for s in self.next_names.get(value, ())
            ]
        return lines

    def _define(self, value: Value) -> str:
        self.names[value] = self._fresh()
        return self.names[value]

    def _fresh(self) -> str:
        self.count += 1
        return f"%{self.count - 1}"

    def _name(self, value: Value, index: int | None = None) -> str:
        return _leaf_name(value, index) if is_leaf(value) else self.names[value]

    def _repeat(self, groups: list[tuple[int, int, int | None]], index: int, fold: _Fold) -> list[str]:
        nodes = self.graph.nodes
        first = nodes[groups[0][0] : groups[0][1]]
        last = nodes[groups[-1][0] : groups[-1][1]]
        head = [(self._fresh(), self._name(initial)) for initial, _, _ in fold.carries]
        outer = {initial: self.names[initial] for initial, _, _ in fold.carries}
        self.names.update((initial, name) for (name, _), initial in zip(head, outer, strict=True))
        body = [line for node in first for line in self._node(node, index, "    ")]
        self.names.update(outer)
        inside = set(last)
        yielded = [
            (place, value)
            for place, node in enumerate(last)
            for value in node.results
            if value in self.outputs or any(r not in inside for r in self.readers.get(value, ()))
        ]
        local = {(p, v.index): self.names[v] for p, n in enumerate(first) for v in n.results}
        carry = ", ".join(
            f"{name} = {start} <- {local[place, result]}"
            for (name, start), (_, place, result) in zip(head, fold.carries, strict=True)
        )
        for _, value in yielded:
            self.names[value] = self._fresh()
        targets = ", ".join(self.names[v] for _, v in yielded)
        bound = f"{targets} = " if targets else ""
        carried = f" carry ({carry})" if carry else ""
        lines = [f"  {bound}repeat layer = {index}..{index + len(groups) - 1}{carried} {{", *body]
        if yielded:
            lines.append(f"    yield {', '.join(local[p, v.index] for p, v in yielded)}")
        return [*lines, "  }"]

    def _foldable(self, groups: list[tuple[int, int, int | None]]) -> _Fold | None:
        """How many of the groups, from the first on, repeat one structure; None below two."""
        nodes = self.graph.nodes
        start, stop, index = groups[0]
        if index is None:
            return None
        carries: dict[tuple[int, int], Value] = {}
        members: list[Sequence[Node]] = [nodes[start:stop]]
        pattern: list[Any] | None = None
        for first, last, following in groups[1:]:
            group = nodes[first:last]
            if following != index + len(members) or len(group) != len(members[0]):
                break
            keys = _group_keys(group, members[-1], following, self.next_names)
            if pattern is None:
                found = _match_first(members[0], keys, index, self.next_names)
                if found is None:
                    break
                pattern, carries = keys, found
            elif keys != pattern:
                break
            members.append(group)
        while len(members) > 1 and self._escapes(members):
            members.pop()
        if len(members) < 2:
            return None
        if any(is_leaf(v) for v in carries.values()):
            return None
        return _Fold(len(members), tuple((v, place, result) for (place, result), v in carries.items()))

    def _escapes(self, members: list[Sequence[Node]]) -> bool:
        """Whether a layer but the last makes a value that is read beyond the next layer."""
        for this, following in pairwise(members):
            near = {*this, *following}
            for node in this:
                for value in node.results:
                    if value in self.outputs or any(r not in near for r in self.readers.get(value, ())):
                        return True
        return False


def _runs(indices: Sequence[int | None]) -> list[tuple[int, int, int | None]]:
    """Maximal runs of equal layer numbers as (start, stop, number)."""
    result: list[tuple[int, int, int | None]] = []
    for i, index in enumerate(indices):
        if result and result[-1][2] == index:
            result[-1] = (result[-1][0], i + 1, index)
        else:
            result.append((i, i + 1, index))
    return result


def _group_keys(
    group: Sequence[Node], before: Sequence[Node] | None, index: int, next_names: Mapping[Value, list[Value]]
) -> list[Any]:
    """A group's structure: each node's op, types, place and where its operands come from."""
    local = {n: i for i, n in enumerate(group)}
    previous = {n: i for i, n in enumerate(before or ())}
    keys = []
    for node in group:
        operands: list[tuple[Any, ...]] = []
        for value in node.inputs:
            if value.node in local:
                operands.append(("local", local[value.node], value.index))
            elif value.node in previous:
                operands.append(("carry", previous[value.node], value.index))
            elif is_leaf(value):
                operands.append(("leaf", _leaf_name(value, index)))
            else:
                operands.append(("outer", value))
        nexts = [[_leaf_name(s, index) for s in next_names.get(v, ())] for v in node.results]
        keys.append((node.op, node.types, layer_template(node.loc, index), operands, nexts))
    return keys


def _match_first(
    group: Sequence[Node], keys: list[Any], index: int, next_names: Mapping[Value, list[Value]]
) -> dict[tuple[int, int], Value] | None:
    """Whether the first layer has the second's structure; gives the carried values' initial ones."""
    carries: dict[tuple[int, int], Value] = {}
    for node, own, key in zip(group, _group_keys(group, None, index, next_names), keys, strict=True):
        if own[:3] != key[:3] or own[4] != key[4] or len(own[3]) != len(key[3]):
            return None
        for value, mine, theirs in zip(node.inputs, own[3], key[3], strict=True):
            if theirs[0] == "carry":
                if mine[0] == "local" or carries.setdefault(theirs[1:], value) != value:
                    return None
            elif mine != theirs:
                return None
    if len(set(carries.values())) != len(carries):
        return None
    initial = set(carries.values())
    sources = [pair for n, k in zip(group, keys, strict=True) for pair in zip(n.inputs, k[3], strict=True)]
    plain = {value for value, source in sources if source[0] != "carry"}
    return None if initial & plain else carries


def _state_line(value: Value, index: int | None) -> str:
    state = value.op.state  # type: ignore[attr-defined]
    type = TensorType(state.dtype, state.shape)
    return f"state {_leaf_name(value, index)}: {state.kind} {type} {state.layer_group}"
