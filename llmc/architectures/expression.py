"""The arithmetic of descriptions: `hidden_size / num_heads`, `window if layer % 2 == 0 else 0`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

from llmc.ir.errors import LlmcError

_MAX_CHARACTERS = 200
_MAX_BITS = 256

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ALLOWED = (
    "names, numbers, 'texts', + - * / // % **, comparisons, `in`, `and`, `or`, `not`, `a if condition else b`"
    " and parentheses"
)


class ConfigurationError(LlmcError):
    """A model's configuration, or a description of a family, says something that cannot be built."""


def names(expression: str) -> set[str]:
    """The names that an expression may ask for; none where it is no expression."""
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def evaluate(expression: str, lookup: Callable[[str], Any], where: str) -> Any:
    """The value of an expression. `/` of two integers must leave no rest; `//` of a fraction gives an integer.

    Only the branch of a condition that counts is evaluated. Raises `ConfigurationError` naming `where` it stands.
    """
    if len(expression) > _MAX_CHARACTERS:
        raise ConfigurationError(f"{where}: the expression has {len(expression)} characters; at most {_MAX_CHARACTERS}")
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigurationError(f"{where}: {expression!r} is no expression") from error
    try:
        return _Evaluation(expression, lookup, where).value(tree)
    except (OverflowError, RecursionError) as error:
        raise ConfigurationError(f"{where}: {expression!r} is too large a number") from error


class _Evaluation:
    def __init__(self, expression: str, lookup: Callable[[str], Any], where: str) -> None:
        self.expression, self.lookup, self.where = expression, lookup, where

    def fail(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"{self.where}: {why}")

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name():
                return self.lookup(node.id)
            case ast.Constant(value=int() | float() | str()):
                return node.value
            case ast.UnaryOp(op=ast.USub()):
                return -self.number(node.operand)
            case ast.UnaryOp(op=ast.Not()):
                return not self.truth(node.operand)
            case ast.BoolOp(op=ast.And()):
                return all(self.truth(part) for part in node.values)
            case ast.BoolOp(op=ast.Or()):
                return any(self.truth(part) for part in node.values)
            case ast.IfExp():
                return self.value(node.body if self.truth(node.test) else node.orelse)
            case ast.Compare(ops=[comparison]):
                return self.compare(node.left, comparison, node.comparators[0])
            case ast.BinOp():
                return self.arithmetic(node)
        raise self.fail(f"{self.expression!r} may use {_ALLOWED} only")

    def number(self, node: ast.expr) -> int | float:
        value = self.value(node)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(f"{ast.unparse(node)!r} must be a number, given {shown(value)}")
        return value

    def truth(self, node: ast.expr) -> bool:
        value = self.value(node)
        if not isinstance(value, bool):
            raise self.fail(f"{ast.unparse(node)!r} must be true or false, given {shown(value)}")
        return value

    def compare(self, left: ast.expr, comparison: ast.cmpop, right: ast.expr) -> bool:
        if isinstance(comparison, ast.In | ast.NotIn):
            choices = self.value(right)
            if not isinstance(choices, list):
                raise self.fail(f"{ast.unparse(right)!r} must be a list, given {shown(choices)}")
            return (self.value(left) in choices) is isinstance(comparison, ast.In)
        if type(comparison) not in _COMPARISONS:
            raise self.fail(f"{self.expression!r} may use {_ALLOWED} only")
        if isinstance(comparison, ast.Eq | ast.NotEq):
            return _COMPARISONS[type(comparison)](self.value(left), self.value(right))
        return _COMPARISONS[type(comparison)](self.number(left), self.number(right))

    def arithmetic(self, node: ast.BinOp) -> int | float:
        if not isinstance(node.op, ast.Div | ast.Pow) and type(node.op) not in _ARITHMETIC:
            raise self.fail(f"{self.expression!r} may use {_ALLOWED} only")
        left, right = self.number(node.left), self.number(node.right)
        if right == 0 and isinstance(node.op, ast.Div | ast.FloorDiv | ast.Mod):
            raise self.fail(f"{self.expression!r} divides by zero")
        if isinstance(node.op, ast.Pow):
            return self.power(left, right)
        if isinstance(node.op, ast.Div):
            if not (isinstance(left, int) and isinstance(right, int)):
                return left / right
            if left % right:
                raise self.fail(f"{self.expression!r} must be a whole number, given {left} / {right}")
            return left // right
        result: int | float = _ARITHMETIC[type(node.op)](left, right)
        return int(result) if isinstance(node.op, ast.FloorDiv) else result

    def power(self, base: int | float, exponent: int | float) -> int | float:
        if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > _MAX_BITS:
            raise OverflowError
        if base <= 0:
            raise self.fail(f"{self.expression!r} takes a power of {shown(base)}, want a positive number")
        result: int | float = base**exponent
        return result


def expressions(table: object) -> Iterator[str]:
    """Every text in a table and the tables in it: what may be an expression."""
    if isinstance(table, str):
        yield table
    elif isinstance(table, dict):
        for value in table.values():
            yield from expressions(value)


def shown(value: Any) -> str:
    """A value in a message, shortened."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def finite(value: int | float) -> bool:
    """Whether a number is finite as a float."""
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
