"""The text form of a graph, read: `parse(str(graph)) == graph`."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from llmc.ir.errors import LlmcError, ParseError, nearest
from llmc.ir.graph import Graph, Input, Param, State, StateInput
from llmc.ir.op import ConstantData, Node, Op, Value
from llmc.ir.printer import LAYER
from llmc.ir.types import Dim, DType, Linear, Shape, TensorType, symbol

_SYMBOL = re.compile(r"symbol (\w+) = (\d+)\.\.(\d*)(?: multiple (\d+))?")
_LEAF = re.compile(r"(input|param|state) [%$&](\S+): (?:(\w+) (?=\w+\[))?(\w+\[.*\])(?: (\w+))?")
_REPEAT = re.compile(r"(?:(.+?) = )?repeat layer = (\d+)\.\.(\d+)(?: carry \((.*)\))? \{")
_NODE = re.compile(r"(%[^=]*?) = (\w+)\((.*?)\)(?: \{(.*)\})? : (.*?)(?: @(\S+))?")
_CARRY = re.compile(r"(%\w+) = (\S+) <- (%\w+)")
_NEXT = re.compile(r"next &(\S+) = (%\w+)")
_MAX_REPEATS = 4096


@dataclass
class _Repeat:
    number: int
    targets: list[str]
    first: int
    last: int
    carries: list[tuple[str, str, str]]
    body: list[tuple[int, str]] = field(default_factory=list)


def parse(text: str, constants: Mapping[str, ConstantData] | None = None) -> Graph:
    """The graph that the text describes. `constants` gives the arrays named by sha256.

    Raises `ParseError` with the line's number, its text and what was expected there. Types are taken as written:
    `verify` infers them again.
    """
    return _Parser(constants or {}).read(text)


def parse_attribute(text: str, symbols: Mapping[str, Dim] | None = None) -> Any:
    """One attribute's value: a number, string, bool, None, dtype, dimension, or a list of them (as a tuple)."""
    try:
        return _Evaluator(symbols or {}, {}).value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ParseError(f"cannot read the value {text!r}: {error}") from None


class _Parser:
    def __init__(self, constants: Mapping[str, ConstantData]) -> None:
        self.evaluator = _Evaluator({}, constants)
        self.leaves: dict[str, dict[str, Value]] = {"input": {}, "param": {}, "state": {}}
        self.values: dict[str, Value] = {}
        self.next: dict[str, Value] = {}

    def read(self, text: str) -> Graph:
        lines = [(n, s.strip()) for n, s in enumerate(text.splitlines(), 1)]
        lines = [(n, s) for n, s in lines if s and not s.startswith("//")]
        if not lines:
            raise ParseError("an empty text is no graph; it begins with 'graph NAME {'")
        number, line = lines[0]
        head = re.fullmatch(r"graph (\S+) \{", line)
        if not head:
            raise self._error(number, line, "'graph NAME {'")
        returned: list[tuple[str, Value]] | None = None
        for item in self._items(lines[1:]):
            if isinstance(item, _Repeat):
                self._repeat(item)
                continue
            number, line = item
            if line == "}":
                if returned is None:
                    raise self._error(number, line, "a 'return' line before the end")
                states = tuple(self.leaves["state"].values())
                following = tuple(self.next.get(label, v) for label, v in self.leaves["state"].items())
                inputs, params = (tuple(self.leaves[k].values()) for k in ("input", "param"))
                return Graph(head.group(1), inputs, params, states, tuple(returned), following)
            if line.startswith("return "):
                returned = [self._output(number, line, part) for part in split(line[7:])]
            else:
                self._line(number, line)
        raise ParseError("the text ends before the closing '}' of the graph")

    def _items(self, lines: list[tuple[int, str]]) -> Iterator[_Repeat | tuple[int, str]]:
        repeat: _Repeat | None = None
        for number, line in lines:
            found = _REPEAT.fullmatch(line)
            if found:
                if repeat:
                    raise self._error(number, line, "no 'repeat' inside another")
                carries = [_CARRY.fullmatch(c) for c in split(found.group(4) or "")]
                if not all(carries):
                    raise self._error(number, line, "carries of the form '%name = %initial <- %following'")
                triples = [(c.group(1), c.group(2), c.group(3)) for c in carries if c]
                repeat = _Repeat(number, split(found.group(1) or ""), int(found.group(2)), int(found.group(3)), triples)
                if not 0 <= repeat.last - repeat.first < _MAX_REPEATS:
                    raise self._error(number, line, f"1 to {_MAX_REPEATS} repeats")
            elif repeat and line == "}":
                yield repeat
                repeat = None
            elif repeat:
                repeat.body.append((number, line))
            else:
                yield number, line
        if repeat:
            raise ParseError(f"line {repeat.number}: the 'repeat' that begins here has no closing '}}'")

    def _repeat(self, repeat: _Repeat) -> None:
        bound = [self._value(repeat.number, start) for _, start, _ in repeat.carries]
        yielded: list[str] = []
        for layer in range(repeat.first, repeat.last + 1):
            self.values.update((name, v) for (name, _, _), v in zip(repeat.carries, bound, strict=True))
            for number, line in repeat.body:
                if line.startswith("yield "):
                    yielded = split(line[6:])
                else:
                    self._line(number, line.replace(LAYER, str(layer)))
            bound = [self._value(repeat.number, following) for _, _, following in repeat.carries]
        if len(yielded) != len(repeat.targets):
            raise ParseError(f"line {repeat.number}: {len(repeat.targets)} names are bound to {len(yielded)} results")
        results = [self._value(repeat.number, name) for name in yielded]
        self.values.update(zip(repeat.targets, results, strict=True))

    def _line(self, number: int, line: str) -> None:
        if found := _SYMBOL.fullmatch(line):
            name, low, high, multiple = found.groups()
            if name in self.evaluator.symbols:
                raise self._error(number, line, f"each symbol once; {name!r} is declared twice")
            try:
                made = symbol(name, int(low), int(high) if high else None, int(multiple or 1))
            except LlmcError as error:
                raise ParseError(f"line {number}: {error}") from None
            self.evaluator.symbols[name] = made
        elif found := _NEXT.fullmatch(line):
            if found.group(1) not in self.leaves["state"]:
                raise self._error(number, line, f"a state; {nearest(found.group(1), self.leaves['state'])}")
            self.next[found.group(1)] = self._value(number, found.group(2))
        elif found := _LEAF.fullmatch(line):
            self._leaf(number, line, *found.groups())
        elif found := _NODE.fullmatch(line):
            self._node(number, line, *found.groups())
        else:
            expected = "'%a = op(%b) {attribute=value} : dtype[shape] @place', a leaf, or 'return'"
            raise self._error(number, line, expected)

    def _leaf(self, number: int, line: str, what: str, label: str, kind: str, type_text: str, group: str) -> None:
        type = self._type(number, line, type_text)
        if label in self.leaves[what]:
            raise self._error(number, line, f"each {what} once; {label!r} is declared twice")
        op: Op
        if what == "state":
            if not kind:
                raise self._error(number, line, "'state &name: kind dtype[shape] group'")
            op = StateInput(State(label, kind, type.dtype, type.shape, group or "full"))
        else:
            op = Input(label) if what == "input" else Param(label)
        value = Value(Node(op, (), (type,)))
        self.leaves[what][label] = value
        self.values[{"input": "%", "param": "$", "state": "&"}[what] + label] = value

    def _node(
        self, number: int, line: str, targets: str, name: str, operands: str, attributes: str, types: str, loc: str
    ) -> None:
        kind = Op.registry.get(name)
        if kind is None or kind.leaf:
            raise ParseError(f"line {number}: there is no op {name!r}; {nearest(name, _computing())}")
        given: dict[str, Any] = {}
        for part in split(attributes or ""):
            key, equals, value = part.partition("=")
            if not equals:
                raise self._error(number, line, f"attribute=value, not {part!r}")
            given[key] = self._attribute(number, value)
        try:
            _check_attributes(kind, given)
            op = kind(**_with_constants(kind, given))
        except (TypeError, ValueError, ParseError) as error:
            raise ParseError(f"line {number}: {name}: {error}") from None
        inputs = tuple(self._value(number, operand) for operand in split(operands))
        result_types = tuple(self._type(number, line, t) for t in split(types, ";"))
        names = split(targets)
        if len(names) != len(result_types):
            raise self._error(number, line, f"as many types as results ({len(names)})")
        node = Node(op, inputs, result_types, loc or "")
        self.values.update(zip(names, node.results, strict=True))

    def _output(self, number: int, line: str, part: str) -> tuple[str, Value]:
        name, equals, value = part.partition("=")
        if not equals:
            raise self._error(number, line, "'return name=%value'")
        return name, self._value(number, value)

    def _value(self, number: int, name: str) -> Value:
        if name not in self.values:
            raise ParseError(f"line {number}: {name} is not defined above; {nearest(name, self.values)}")
        return self.values[name]

    def _attribute(self, number: int, text: str) -> Any:
        try:
            return self.evaluator.value(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, LlmcError) as error:
            raise ParseError(f"line {number}: cannot read the value {text!r}: {error}") from None

    def _type(self, number: int, line: str, text: str) -> TensorType:
        dtype, bracket, dims = text.partition("[")
        known = {d.value: d for d in DType}
        if dtype not in known or not bracket or not dims.endswith("]"):
            raise self._error(number, line, f"a type dtype[shape], not {text!r}")
        shape: Shape = self._attribute(number, f"[{dims[:-1]}]")
        if not all(isinstance(d, Linear) or (isinstance(d, int) and d >= 0) for d in shape):
            raise self._error(number, line, f"dimensions that are sizes or symbols, not {text!r}")
        return TensorType(known[dtype], shape)

    def _error(self, number: int, line: str, expected: str) -> ParseError:
        return ParseError(f"line {number}: expected {expected}; given: {line}")


class _Evaluator:
    """Values of attributes and dimensions, from Python's expression grammar; nothing is executed."""

    def __init__(self, symbols: Mapping[str, Dim], constants: Mapping[str, ConstantData]) -> None:
        self.symbols = dict(symbols)
        self.constants = constants
        self.names: dict[str, Any] = {"inf": float("inf"), "nan": float("nan"), **{d.value: d for d in DType}}

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value) if isinstance(value, str | int | float | bool) or value is None:
                return value
            case ast.List(elts=items):
                return tuple(map(self.value, items))
            case ast.Name(id=name) if name in self.symbols:
                return self.symbols[name]
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.Name(id=name):
                choices = nearest(name, [*self.symbols, *self.names])
                raise ParseError(f"{name} is neither a symbol nor a dtype; {choices}")
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.value(operand)
            case ast.BinOp(left=left, op=operator, right=right):
                return self._binary(self.value(left), operator, self.value(right))
            case ast.Call(func=ast.Name(id="sha256"), args=[ast.Constant(value=str(digest))]):
                if digest not in self.constants:
                    raise ParseError(f"the constant {digest[:12]}… was not given beside the text")
                return self.constants[digest]
        raise ParseError(f"{ast.unparse(node)} is no value")

    def _binary(self, left: Any, operator: ast.operator, right: Any) -> Any:
        if not all(isinstance(v, int | Linear) for v in (left, right)):
            raise ParseError("arithmetic is for dimensions only")
        match operator:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.FloorDiv() if right != 0:
                return left // right
        raise ParseError("dimensions are added, subtracted, multiplied by and divided (//) by integers")


def _computing() -> list[str]:
    """Names of the ops that a text may use in nodes."""
    return [name for name, kind in Op.registry.items() if not kind.leaf]


def _check_attributes(kind: type[Op], given: Mapping[str, Any]) -> None:
    """Raise `ParseError` unless every attribute has the kind that its field declares."""
    for f in fields(kind):  # type: ignore[arg-type]
        accepted = _KINDS.get(str(f.type))
        if f.name in given and accepted is not None and not accepted(given[f.name]):
            raise ParseError(f"{f.name} must be of kind {f.type}, given {given[f.name]!r}")


_KINDS: dict[str, Callable[[Any], bool]] = {
    "bool": lambda v: isinstance(v, bool),
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "DType": lambda v: isinstance(v, DType),
    "Shape": lambda v: isinstance(v, tuple) and all(isinstance(d, int | Linear) for d in v),
    "tuple[int, ...]": lambda v: isinstance(v, tuple) and all(isinstance(d, int) for d in v),
}
"""What an attribute's declared type accepts; other declared types are not checked."""


def _with_constants(kind: type[Op], given: dict[str, Any]) -> dict[str, Any]:
    """The attributes with numbers that are written out where the op takes an array made into one, of its `dtype`."""
    dtype = given.get("dtype")
    arrays = {f.name for f in fields(kind) if f.type in (ConstantData, "ConstantData")}  # type: ignore[arg-type]
    if not arrays or not isinstance(dtype, DType):
        return given
    return {
        k: ConstantData(np.array(v, dtype.numpy)) if k in arrays and not isinstance(v, ConstantData) else v
        for k, v in given.items()
    }


def split(text: str, separator: str = ",") -> list[str]:
    """Parts at the top level of brackets, stripped; strings may hold anything."""
    parts, depth, start, quote = [], 0, 0, ""
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote and text[i - 1] != "\\" else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    if text[start:].strip():
        parts.append(text[start:].strip())
    return parts
