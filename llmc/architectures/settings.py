"""A model's configuration as a description reads it: named values, defaults, and which keys were understood."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, NewType, get_args, get_origin

from llmc.architectures.expression import ConfigurationError, evaluate, expressions, finite, names, shown
from llmc.ir.errors import nearest

__all__ = ["MAX_DIMENSION", "ConfigurationError", "Count", "Rule", "Settings", "convert", "evaluate"]

MAX_DIMENSION = 1 << 24
"""No size in a configuration may be larger: far above real models, far below what would take memory."""

LAYER = "layer"
"""The name that expressions of a layer's blocks have for its number, from 0."""

Count = NewType("Count", int)
"""A size that may be 0, where it means that there is no such thing."""

ZERO = Count(0)


@dataclass(frozen=True)
class Rule:
    """How one named value is read: the first of `keys` that is set, else `default`, else `otherwise` evaluated.

    A key with a dot is one inside a table. `per_layer`: the value is a list with one entry for each layer. `null`: the
    value of a key that is there and null, where that is not the same as a key that is absent.
    """

    keys: tuple[str, ...]
    default: bool | int | float | str | list[Any] | None = None
    otherwise: str | None = None
    per_layer: bool = False
    null: bool | int | float | str | None = None


class Settings:
    """The values that a description's `[config]` table names, read from one configuration; remembers what was read."""

    def __init__(self, config: Mapping[str, Any], source: str, rules: Mapping[str, Rule]) -> None:
        self.config = config
        self.source = source
        self.rules = rules
        self.taken: set[str] = set()
        self.used: set[str] = set()
        self._layer: int | None = None
        self._open: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.rules

    @contextmanager
    def at_layer(self, layer: int) -> Iterator[None]:
        """Values are those of one layer inside."""
        self._layer = layer
        try:
            yield
        finally:
            self._layer = None

    def get(self, name: str) -> Any:
        """The value of a name. Raises `ConfigurationError` naming the key when it is missing or set twice."""
        if name == LAYER and self._layer is not None:
            return self._layer
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
            return self._of_layer(name, first) if rule.per_layer else first
        if rule.null is not None and any(key in self.config for key in rule.keys):
            return rule.null
        if rule.otherwise is not None:
            self._open.append(name)
            value = self.evaluate(rule.otherwise, f"{name} of {self.source}")
            self._open.pop()
            return value
        if rule.default is None:
            why = "" if rule.keys[0] == name else f", which [config] reads for {name!r}"
            raise ConfigurationError(f"{self.source}: the key {rule.keys[0]!r} is missing{why}")
        return rule.default

    def take(self, key: str) -> Any:
        """The configuration's value of a key (None when absent or null); the key counts as understood."""
        self.taken.add(key)
        outer, _, inner = key.partition(".")
        if not inner:
            return self.config.get(key)
        table = self.config.get(outer)
        return table.get(inner) if isinstance(table, dict) else None

    def stated(self, name: str) -> Any:
        """What the configuration itself says of a name, or of a key where there is no such name; else None."""
        if name not in self.rules:
            return self.take(name)
        self.mention(name)
        return next((value for key in self.rules[name].keys if (value := self.take(key)) is not None), None)

    def mention(self, table: object) -> None:
        """What a table of a description names counts as used and understood, although nothing asks for it now."""
        pending = [name for text in expressions(table) for name in names(text)]
        seen: set[str] = set()
        while pending:
            name = pending.pop()
            rule = self.rules.get(name)
            if rule is None or name in seen:
                continue
            seen.add(name)
            self.used.add(name)
            self.taken.update(rule.keys)
            pending += names(rule.otherwise or "")

    def origin(self, name: str) -> str:
        """Where a value came from, for messages: the key that is set, else the first that could be."""
        keys = self.rules[name].keys or (name,)
        return next((k for k in keys if self.config.get(k) is not None), keys[0])

    def evaluate(self, expression: str, where: str) -> Any:
        """The value of an expression of named values (see `expression`)."""

        def named(name: str) -> Any:
            if name == LAYER and self._layer is None:
                raise ConfigurationError(f"{where}: {LAYER!r}, the number of a layer, is known inside [layer] alone")
            if name != LAYER and name not in self.rules:
                raise ConfigurationError(f"{where}: [config] names no value {name!r}; {nearest(name, self.rules)}")
            return self.get(name)

        self.mention(expression)
        return evaluate(expression, named, where)

    def _of_layer(self, name: str, value: Any) -> Any:
        key, count = self.origin(name), self.get("num_layers")
        if not isinstance(value, list) or len(value) != count:
            raise ConfigurationError(f"{self.source}: {key} must be a list of {count} values, one for each layer")
        if self._layer is None:
            raise ConfigurationError(f"{self.source}: {key} has a value for each layer; only a layer's blocks have one")
        return value[self._layer]

    def check_understood(self, harmless: Iterable[str], neutral: Mapping[str, list[Any]], family: str) -> None:
        """Raise `ConfigurationError` for a key that was not read and could change the computation."""
        harmless = set(harmless)
        accepted = self.taken | harmless
        for key, value in self._flat():
            inner = key.rpartition(".")[2]
            if key in accepted or inner in harmless or value is None:
                continue
            known = key if key in neutral else inner
            if known not in neutral:
                close = get_close_matches(key, sorted(self.taken | set(neutral)), n=1, cutoff=0.0)
                near = f"; the nearest key that it understands is {close[0]!r}" if close else ""
                raise ConfigurationError(
                    f"{self.source}: the key {key!r} (= {shown(value)}) is not understood by the description of"
                    f" {family!r} and may change what the model computes{near}. A description reads a key in [config],"
                    " or lists it in 'ignored' or, with the values that change nothing, in 'neutral'"
                )
            if not any(type(value) is type(allowed) and value == allowed for allowed in neutral[known]):
                allowed = " or ".join(map(shown, neutral[known])) or "null"
                raise ConfigurationError(
                    f"{self.source}: {key!r} is {shown(value)}, which the blocks of {family!r} do not compute;"
                    f" supported: {allowed}"
                )

    def _flat(self) -> Iterator[tuple[str, Any]]:
        """The configuration's keys, those of tables that a rule looks into one by one."""
        outer = {key.partition(".")[0] for key in self.taken if "." in key}
        for key, value in self.config.items():
            if key in outer and isinstance(value, dict):
                yield from ((f"{key}.{inner}", v) for inner, v in value.items())
            else:
                yield key, value


def convert(value: Any, kind: object, where: str) -> Any:
    """A configuration's value as an int (a size: 1 to 2^24), `Count` (0 to 2^24), float, bool, str or one of the texts
    of a `Literal`. Raises naming `where` it stands."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = " or ".join(map(repr, get_args(kind)))
            raise ConfigurationError(f"{where} must be {choices}, given {shown(value)}")
        return value
    if kind is int or kind is Count:
        least, wanted = (1, "a positive integer") if kind is int else (0, "an integer of 0 or more")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigurationError(f"{where} must be {wanted}, given {shown(value)}")
        if value > MAX_DIMENSION:
            raise ConfigurationError(f"{where} is {shown(value)}, which is absurd: at most {MAX_DIMENSION}")
        return value
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not finite(value):
            raise ConfigurationError(f"{where} must be a finite number, given {shown(value)}")
        return float(value)
    assert isinstance(kind, type)
    if not isinstance(value, kind):
        what = "true or false" if kind is bool else "text"
        # A configuration's list of zeros and ones is no mistake of the configuration.
        hint = "; a comparison makes a flag of a number: 'x == 1'" if kind is bool and isinstance(value, int) else ""
        raise ConfigurationError(f"{where} must be {what}, given {shown(value)}{hint}")
    return value
