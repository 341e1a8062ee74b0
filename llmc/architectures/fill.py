"""Applying a description: each table becomes a building block, its fields read from the table or a configuration.

A field is, in this order: what the table says (a number, a flag, a text, or an expression of `[config]` names), the
`[config]` value of the field's own name, the field's default. A block's table may have `when`, a condition: where it
does not hold, the table under `otherwise` is laid over it, or, if there is none, the block is the field's default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llmc.architectures.context import Block
from llmc.architectures.expression import shown
from llmc.architectures.rope import RopeParameters, RopeType, read_rope
from llmc.architectures.settings import ConfigurationError, Settings, convert
from llmc.ir.errors import LlmcError, nearest

_PLACEHOLDERS = ("layer", "expert")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


class DescriptionError(LlmcError):
    """A description (TOML) is wrong; names the file, the table and the nearest valid choice."""


@dataclass(frozen=True)
class Filler:
    """Makes blocks for one configuration."""

    settings: Settings
    rope_types: Mapping[str, RopeType]

    def fill(self, kind: type, table: object, where: str) -> Any:
        """A block of a kind from its table. Raises `DescriptionError` and `ConfigurationError`."""
        if not isinstance(table, dict):
            example = "{ kind = '…', name = '…' }" if issubclass(kind, Block) else "{ name = '…' }"
            raise DescriptionError(f"{where} must be a table such as {example}, given {shown(table)}")
        if issubclass(kind, Block):
            kind, table = self._kind(kind, table, where)
        assert is_dataclass(kind)
        hints = get_type_hints(kind)
        known = [f.name for f in fields(kind)]
        for key in table:
            if key not in known:
                raise DescriptionError(f"{where}: there is no field {key!r}; {nearest(key, known)}")
        values: dict[str, Any] = {}
        for field in fields(kind):
            given = self._field(field, _plain(hints[field.name]), table, where)
            if given is not MISSING:
                values[field.name] = given
        try:
            return kind(**values)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.settings.source}: {error}") from error

    def _kind(self, role: type[Block], table: dict[str, Any], where: str) -> tuple[type, dict[str, Any]]:
        """The class that a table names, and the rest of the table."""
        choice = table.get("kind", "")
        if not isinstance(choice, str) or choice not in role.kinds:
            raise DescriptionError(f"{where}: there is no kind {choice!r}; {nearest(str(choice), role.kinds)}")
        return role.kinds[choice], {k: v for k, v in table.items() if k != "kind"}

    def _field(self, field: Field[Any], hint: Any, table: Mapping[str, Any], where: str) -> Any:
        """A field's value, or MISSING where its default serves."""
        settings, place = self.settings, f"{where}, {field.name}"
        if hint is RopeParameters:
            limit = convert(settings.get("max_positions"), int, self._key("max_positions"))
            return read_rope(settings, self.rope_types, limit)
        if isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, Block)):
            inner = self.choose(hint, table.get(field.name), place)
            if inner is not None:
                return self.fill(hint, inner, place)
            if field.default is MISSING:
                raise DescriptionError(f"{where}: the table {field.name!r} is missing")
            return MISSING
        if field.name in table:
            given = table[field.name]
            if isinstance(given, str) and not _is_text(hint):
                place = self._key(given) if given in settings else place
                given = settings.evaluate(given, place)
            value = convert(given, hint, place)
            if hint is str:
                _check_placeholders(value, place)
            return value
        if field.name in settings:
            return convert(settings.get(field.name), hint, self._key(field.name))
        if field.default is MISSING:
            raise DescriptionError(f"{where}: the field {field.name!r} is missing, and [config] does not name it")
        return MISSING

    def choose(self, role: type, table: object, place: str) -> object:
        """The table that counts, of those under `when` and `otherwise`; None where none does. What is not taken counts
        as understood."""
        while isinstance(table, dict) and "when" in table:
            condition, branch = table["when"], table.get("otherwise")
            if not isinstance(condition, str):
                raise DescriptionError(f"{place}: 'when' must be a condition, as text")
            holds = convert(self.settings.evaluate(condition, f"{place}, when"), bool, f"{place}, when")
            rest = {k: v for k, v in table.items() if k not in ("when", "otherwise")}
            other = None if branch is None else _other(role, rest, branch)
            self._mention(role, other if holds else rest)
            table = rest if holds else other
        return table

    def _mention(self, role: type, table: object) -> None:
        """A table that is not read: what it names, and what its fields would ask for by their own names."""
        if not isinstance(table, dict):
            return
        self.settings.mention(table)
        kind: type = role.kinds.get(table.get("kind", ""), role) if issubclass(role, Block) else role
        if not is_dataclass(kind):
            return
        hints = get_type_hints(kind)
        for field in fields(kind):
            hint = _plain(hints[field.name])
            if field.name not in table:
                self.settings.mention(field.name)
            elif isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, Block)):
                self._mention(hint, table[field.name])

    def _key(self, name: str) -> str:
        return f"{self.settings.source}: {self.settings.origin(name)!r}"


def _other(role: type, table: Mapping[str, Any], branch: object) -> object:
    """What `otherwise` says, and what it leaves as it is; of a block of another kind only the fields that it has."""
    if not isinstance(branch, dict):
        return branch
    kind = role.kinds.get(branch.get("kind", "")) if issubclass(role, Block) else None
    if kind is not None and is_dataclass(kind):
        table = {k: v for k, v in table.items() if k in {f.name for f in fields(kind)}}
    return merged(table, branch)


def merged(base: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """A table laid over another: tables are merged, lists follow each other, all else is replaced. A block of another
    kind replaces the whole block."""
    result = dict(base)
    for key, value in table.items():
        old = base.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind"):
            result[key] = merged(old, value)
        elif isinstance(value, list) and isinstance(old, list):
            result[key] = [*old, *value]
        else:
            result[key] = value
    return result


def _check_placeholders(name: str, place: str) -> None:
    """What stands in braces is replaced later; a misspelt one would be looked for in the checkpoint as it is."""
    for found in _PLACEHOLDER.findall(name):
        if found not in _PLACEHOLDERS:
            raise DescriptionError(f"{place}: {name!r} has {{{found}}}; {nearest(found, _PLACEHOLDERS)}")


def _is_text(hint: Any) -> bool:
    """Whether a field's texts are taken as they stand; those of all others are expressions."""
    return hint is str or get_origin(hint) is Literal


def _plain(hint: Any) -> Any:
    """A field's type without `| None`, which says only that it may be left out."""
    if isinstance(hint, UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    return hint
