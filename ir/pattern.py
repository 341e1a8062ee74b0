"""Patterns: subgraphs with holes for operands and attributes, traced from functions, and where they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from llmc.ir.op import Emitter, Hole, Node, Op, Value, as_tuple


@dataclass(frozen=True)
class Var:
    """A hole for an attribute: matches any value, the same wherever it occurs."""

    name: str


@dataclass(frozen=True)
class NoMatch:
    """Why a rule does not apply, at which node, and how many nodes had fitted before."""

    reason: str
    node: Node | None = None
    depth: int = 0

    def __str__(self) -> str:
        return f"{self.reason}" + (f" (at {self.node!r})" if self.node else "")


@dataclass(frozen=True)
class Match:
    """A subgraph that fits: operands and attributes by name, the nodes it covers, the values it replaces in order."""

    root: Node
    operands: Mapping[str, Value]
    attributes: Mapping[str, Any]
    nodes: frozenset[Node]
    replaced: tuple[Value, ...]

    def __getitem__(self, name: str) -> Value:
        return self.operands[name]


@dataclass(frozen=True)
class Pattern:
    """A traced pattern: untyped nodes over holes."""

    operands: Mapping[str, Value]
    results: tuple[Value, ...]
    inner: frozenset[Node]

    def match(self, root: Node) -> Match | NoMatch:
        """Fit the pattern with its last result at the root."""
        last = self.results[-1]
        deepest = NoMatch(f"want {last.op.name}, found {root.op.name}", root, 0)
        for found in _match(last, Value(root, last.index), _Bindings()):
            if isinstance(found, NoMatch):
                deepest = max(deepest, found, key=lambda n: n.depth)
                continue
            missing = [r for r in self.results if r not in found.values]
            if missing:
                return NoMatch("a result of the pattern hangs on nothing that the root reaches", root)
            return Match(
                root,
                {name: found.values[hole] for name, hole in self.operands.items()},
                found.attributes,
                frozenset(found.values[Value(n)].node for n in self.inner if Value(n) in found.values),
                tuple(found.values[r] for r in self.results),
            )
        return deepest


def trace(function: Callable[..., Any], names: Sequence[str]) -> Pattern:
    """Run the function on a hole for each name; what it builds is the pattern."""
    holes = {name: Value(Node(Hole(i), (), ())) for i, name in enumerate(names)}
    results = as_tuple(function(_Tracer(), *holes.values()))
    inner: set[Node] = set()
    stack = [v.node for v in results]
    while stack:
        node = stack.pop()
        if not isinstance(node.op, Hole) and node not in inner:
            inner.add(node)
            stack += [v.node for v in node.inputs]
    return Pattern(holes, results, frozenset(inner))


class _Tracer(Emitter):
    """Makes untyped nodes: a pattern."""

    def make(self, op: Op, inputs: tuple[Value, ...]) -> Node:
        node = Node(op, inputs, (), "")
        return _Untyped(node.op, node.inputs, (), "")


class _Untyped(Node):
    @property
    def results(self) -> tuple[Value, ...]:
        return tuple(Value(self, i) for i in range(self.op.result_count))


@dataclass(frozen=True)
class _Bindings:
    values: Mapping[Value, Value] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


def _match(pattern: Value, value: Value, bound: _Bindings) -> Iterator[_Bindings | NoMatch]:
    """All ways in which the pattern fits the value, as bindings; every dead end as a NoMatch."""
    depth = len(bound.values)
    if pattern in bound.values:
        if bound.values[pattern] == value:
            yield bound
        else:
            yield NoMatch("a value occurs twice in the pattern but not here", value.node, depth)
        return
    if isinstance(pattern.op, Hole):
        yield _Bindings({**bound.values, pattern: value}, bound.attributes)
        return
    if type(pattern.op) is not type(value.op) or pattern.index != value.index:
        yield NoMatch(f"want {pattern.op.name}, found {value.op.name}", value.node, depth)
        return
    attributes = dict(bound.attributes)
    for f in fields(pattern.op):  # type: ignore[arg-type]
        want, given = getattr(pattern.op, f.name), getattr(value.op, f.name)
        if isinstance(want, Var):
            want = attributes.setdefault(want.name, given)
        if want != given:
            yield NoMatch(f"{value.op.name}: want {f.name}={want}, found {given}", value.node, depth)
            return
    here = {Value(pattern.node, i): Value(value.node, i) for i in range(max(1, len(value.node.types)))}
    start = _Bindings({**bound.values, **here}, attributes)
    orders = [value.node.inputs]
    if value.op.commutative:
        orders.append(tuple(reversed(value.node.inputs)))
    for operands in orders:
        if len(operands) != len(pattern.node.inputs):
            yield NoMatch(f"{value.op.name} has {len(operands)} operands", value.node, depth)
            return
        yield from _match_all(list(zip(pattern.node.inputs, operands, strict=True)), start)


def _match_all(pairs: list[tuple[Value, Value]], bound: _Bindings) -> Iterator[_Bindings | NoMatch]:
    if not pairs:
        yield bound
        return
    for found in _match(*pairs[0], bound):
        if isinstance(found, NoMatch):
            yield found
        else:
            yield from _match_all(pairs[1:], found)


def operand_count(fused: type[Op]) -> int:
    """How many operands `decompose` unpacks, found by trying: patterns are small."""
    holes = {f.name: Var(f.name) for f in fields(fused)}  # type: ignore[arg-type]
    for count in range(1, 9):
        operands = [Value(Node(Hole(i), (), ())) for i in range(count)]
        try:
            fused(**holes).decompose(_Tracer(), *operands)
        except ValueError:
            continue
        return count
    raise AssertionError(f"{fused.name} cannot be traced")
