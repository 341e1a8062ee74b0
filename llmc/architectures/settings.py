"""A model's configuration as a description reads it: named values, defaults, and which keys were understood."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from llmc.ir.errors import LlmcError, nearest

MAX_DIMENSION = 1 << 24
"""No size in a configuration may be larger: far above real models, far below what would take memory."""


class ConfigurationError(LlmcError):
    """A model's configuration, or a description of a family, says something that cannot be built."""


@dataclass(frozen=True)
class Rule:
    """How one named value is read: the first of `keys` that is set, else `default`, else `otherwise` evaluated."""

    keys: tuple[str, ...]
    default: bool | int | float | str | None = None
    otherwise: str | None = None


class Settings:
    """The values that a description's `[config]` table names, read from one configuration; remembers what was read."""

    def __init__(self, config: Mapping[str, Any], source: str, rules: Mapping[str, Rule]) -> None:
        self.config = config
        self.source = source
        self.rules = rules
        self.taken: set[str] = set()
        self.used: set[str] = set()
        self._open: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.rules

    def get(self, name: str) -> Any:
        """The value of a name. Raises `ConfigurationError` naming the key when it is missing or set twice."""
        if name not in self.rules:
            raise ConfigurationError(f"[config] names no value {name!r}; {nearest(name, self.rules)}")
        if name in self._open:
            raise ConfigurationError(f"[config] defines {name!r} by itself: {' -> '.join([*self._open, name])}")
        rule = self.rules[name]
        self.used.add(name)
        given = {key: value for key in rule.keys if (value := self.take(key)) is not None}
        if given:
            first, *others = given.values()
            if any(value != first for value in others):
                raise ConfigurationError(f"{self.source}: {given} are two names of one value and differ")
            return first
        if rule.otherwise is not None:
            self._open.append(name)
            value = self.evaluate(rule.otherwise, f"{name} of {self.source}")
            self._open.pop()
            return value
        if rule.default is None:
            raise ConfigurationError(f"{self.source}: the key {rule.keys[0]!r} is missing")
        return rule.default

    def take(self, key: str) -> Any:
        """The configuration's value of a key (None when absent or null); the key counts as understood."""
        self.taken.add(key)
        return self.config.get(key)

    def origin(self, name: str) -> str:
        """Where a value came from, for messages: the key that is set, else the first that could be."""
        keys = self.rules[name].keys
        return next((k for k in keys if self.config.get(k) is not None), keys[0])

    def evaluate(self, expression: str, where: str) -> Any:
        """A named value, or arithmetic (+ - * / //) on named values and numbers. Between integers `/` must be exact."""
        return evaluate(expression, self.get, where)

    def check_understood(self, harmless: Iterable[str], neutral: Mapping[str, list[Any]], family: str) -> None:
        """Raise `ConfigurationError` for a key that was not read and could change the computation."""
        accepted = self.taken | set(harmless)
        for key, value in self.config.items():
            if key in accepted or value is None:
                continue
            shown = _short(value)
            if key not in neutral:
                close = get_close_matches(key, sorted(self.taken | set(neutral)), n=1, cutoff=0.0)
                raise ConfigurationError(
                    f"{self.source}: the key {key!r} (= {shown}) is not understood and may change what the model"
                    f" computes; the nearest key that the description of {family!r} understands is {close[0]!r}"
                    if close
                    else f"{self.source}: the key {key!r} (= {shown}) is not understood"
                )
            if not any(type(value) is type(allowed) and value == allowed for allowed in neutral[key]):
                allowed = " or ".join(map(_short, neutral[key])) or "null"
                raise ConfigurationError(
                    f"{self.source}: {key!r} is {shown}, which the blocks of {family!r} do not compute;"
                    f" supported: {allowed}"
                )


def evaluate(expression: str, lookup: Callable[[str], Any], where: str) -> Any:
    """A tiny arithmetic: names, numbers, + - * / // and parentheses. `/` of two integers must leave no rest."""
    if len(expression) > 200:
        raise ConfigurationError(f"{where}: the expression has {len(expression)} characters; at most 200")
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigurationError(f"{where}: {expression!r} is no expression") from error

    def number(node: ast.expr) -> int | float:
        value = visit(node)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigurationError(f"{where}: {ast.unparse(node)!r} must be a number, given {_short(value)}")
        return value

    def visit(node: ast.expr) -> Any:
        match node:
            case ast.Name():
                return lookup(node.id)
            case ast.Constant(value=int() | float()):
                return node.value
            case ast.BinOp(op=ast.Add()):
                return number(node.left) + number(node.right)
            case ast.BinOp(op=ast.Sub()):
                return number(node.left) - number(node.right)
            case ast.BinOp(op=ast.Mult()):
                return number(node.left) * number(node.right)
            case ast.BinOp(op=ast.Div() | ast.FloorDiv()):
                floor = isinstance(node.op, ast.FloorDiv)
                return _divide(number(node.left), number(node.right), floor, f"{where}: {expression!r}")
        raise ConfigurationError(f"{where}: {expression!r} may use names, numbers, + - * / and // only")

    try:
        return visit(tree)
    except (OverflowError, RecursionError) as error:
        raise ConfigurationError(f"{where}: {expression!r} is too large a number") from error


def convert(value: Any, kind: type, where: str) -> Any:
    """A configuration's value as an int (a size: 1 to 2^24), float, bool or str. Raises naming `where` it stands."""
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{where} must be a positive integer, given {_short(value)}")
        if value > MAX_DIMENSION:
            raise ConfigurationError(f"{where} is {_short(value)}, which is absurd: at most {MAX_DIMENSION}")
        return value
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise ConfigurationError(f"{where} must be a finite number, given {_short(value)}")
        return float(value)
    if not isinstance(value, kind):
        what = "true or false" if kind is bool else "text"
        raise ConfigurationError(f"{where} must be {what}, given {_short(value)}")
    return value


def _divide(left: int | float, right: int | float, floor: bool, where: str) -> int | float:
    if right == 0:
        raise ConfigurationError(f"{where} divides by zero")
    if floor:
        return left // right
    if isinstance(left, int) and isinstance(right, int):
        if left % right:
            raise ConfigurationError(f"{where} must be a whole number, given {left} / {right}")
        return left // right
    return left / right


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
