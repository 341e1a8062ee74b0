"""Descriptions: reading a family's TOML, finding the one for a `model_type`, applying it to a configuration."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from llmc.architectures.context import Block
from llmc.architectures.model import Model
from llmc.architectures.rope import RopeParameters, RopeType, read_rope
from llmc.architectures.settings import ConfigurationError, Rule, Settings, convert
from llmc.ir.errors import LlmcError, nearest

_BLOCK_TABLES = ("embedding", "positions", "layer", "final_norm", "head")
_MAX_BYTES = 1 << 20


class DescriptionError(LlmcError):
    """A description (TOML) is wrong; names the file, the table and the nearest valid choice."""


@dataclass(frozen=True)
class Common:
    """What configurations of all families share (common.toml)."""

    harmless: tuple[str, ...]
    neutral: Mapping[str, list[Any]]
    rope_types: Mapping[str, RopeType]


@dataclass(frozen=True)
class Description:
    """A model family: which blocks, how their values are read from a configuration, how weights are named."""

    source: str
    model_types: tuple[str, ...]
    ignored: tuple[str, ...]
    unused_tensors: tuple[str, ...]
    optional_prefix: str
    neutral: Mapping[str, list[Any]]
    rules: Mapping[str, Rule]
    blocks: Mapping[str, Any]

    def apply(self, config: Mapping[str, Any], source: str) -> Model:
        """The model that a configuration (read from `source`) describes.

        Raises `ConfigurationError` for a value that is missing or wrong, and for a key that is not understood.
        """
        shared = common()
        settings = Settings(config, source, self.rules)
        model = _fill(Model, self.blocks, settings, self.source)
        assert isinstance(model, Model)
        _check_layer_types(settings, model.num_layers)
        if idle := sorted(set(self.rules) - settings.used):
            raise DescriptionError(f"{self.source}, [config]: no block uses {', '.join(idle)}")
        neutral = {**shared.neutral, **self.neutral}
        settings.check_understood((*shared.harmless, *self.ignored), neutral, self.model_types[0])
        return model


@cache
def descriptions() -> Mapping[str, Description]:
    """The descriptions that come with llmc, by `model_type`."""
    found: dict[str, Description] = {}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml") and file.name != "common.toml":
            description = parse_description(file.read_bytes(), file.name)
            found.update(dict.fromkeys(description.model_types, description))
    return found


@cache
def common() -> Common:
    """The keys that all families share."""
    table = tomllib.loads(resources.files(__package__).joinpath("common.toml").read_text(encoding="utf-8"))
    types = {k: RopeType(t["scaling"], tuple(t["needs"]), tuple(t["may"])) for k, t in table["rope_types"].items()}
    return Common(tuple(table["harmless"]), table["neutral"], types)


def find_description(model_type: object, source: str, architecture: Path | None = None) -> Description:
    """The user's own description, else the one for the configuration's `model_type`."""
    if architecture is not None:
        try:
            with architecture.open("rb") as file:
                data = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise DescriptionError(f"cannot read the description {architecture}: {error.strerror or error}") from error
        return parse_description(data, str(architecture))
    known = descriptions()
    if model_type is None:
        raise ConfigurationError(f"{source}: the key 'model_type' is missing; known: {', '.join(sorted(known))}")
    if not isinstance(model_type, str) or model_type not in known:
        given = str(model_type)[:80]
        raise ConfigurationError(f"{source}: the model type {given!r} has no description; {nearest(given, known)}")
    return known[model_type]


def parse_description(data: bytes, source: str) -> Description:
    """Read a description's TOML. Raises `DescriptionError`."""
    if len(data) > _MAX_BYTES:
        raise DescriptionError(f"{source}: a description has at most {_MAX_BYTES} bytes")
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise DescriptionError(f"{source} is no TOML: {error}") from error
    known = ("model_types", "ignored", "unused_tensors", "optional_prefix", "neutral", "config", *_BLOCK_TABLES)
    for key in table:
        if key not in known:
            raise DescriptionError(f"{source}: there is no table or key {key!r}; {nearest(key, known)}")
    model_types = _texts(table, "model_types", source)
    if not model_types:
        raise DescriptionError(f"{source}: 'model_types' must name at least one model type")
    prefix = table.get("optional_prefix", "")
    neutral = table.get("neutral", {})
    if not isinstance(prefix, str) or not isinstance(neutral, dict):
        raise DescriptionError(f"{source}: 'optional_prefix' is text and 'neutral' is a table")
    for key, values in neutral.items():
        if not isinstance(values, list):
            raise DescriptionError(f"{source}, [neutral]: {key!r} must be a list of the values that change nothing")
    rules = _rules(table.get("config", {}), source)
    blocks = {k: table[k] for k in _BLOCK_TABLES if k in table}
    ignored, unused = _texts(table, "ignored", source), _texts(table, "unused_tensors", source)
    return Description(source, model_types, ignored, unused, prefix, neutral, rules, blocks)


def _texts(table: Mapping[str, Any], key: str, source: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise DescriptionError(f"{source}: {key!r} must be a list of texts")
    return tuple(value)


def _rules(table: Any, source: str) -> dict[str, Rule]:
    """The `[config]` table: a value is a key's name, or a table with `key`, and `default` or `otherwise`."""
    if not isinstance(table, dict):
        raise DescriptionError(f"{source}: 'config' must be a table")
    rules: dict[str, Rule] = {}
    for name, entry in table.items():
        entry = {"key": entry} if isinstance(entry, str) else entry
        where = f"{source}, [config], {name!r}"
        if not isinstance(entry, dict) or not set(entry) <= {"key", "default", "otherwise"} or "key" not in entry:
            raise DescriptionError(f"{where} must be a key's name or {{ key, default | otherwise }}")
        keys = entry["key"] if isinstance(entry["key"], list) else [entry["key"]]
        default, otherwise = entry.get("default"), entry.get("otherwise")
        if not keys or not all(isinstance(k, str) for k in keys):
            raise DescriptionError(f"{where}: 'key' must be text or a list of texts")
        if default is not None and not isinstance(default, bool | int | float | str):
            raise DescriptionError(f"{where}: 'default' must be a number, a flag or text")
        if otherwise is not None and (not isinstance(otherwise, str) or default is not None):
            raise DescriptionError(f"{where}: 'otherwise' must be an expression, without a 'default'")
        rules[name] = Rule(tuple(keys), default, otherwise)
    return rules


def _fill(kind: type, table: object, settings: Settings, where: str) -> Any:
    """Make a block from its table: each field from the table, else from `[config]`, else its default."""
    if not isinstance(table, dict):
        raise DescriptionError(f"{where} must be a table")
    if issubclass(kind, Block):
        choice = table.get("kind", "")
        if not isinstance(choice, str) or choice not in kind.kinds:
            raise DescriptionError(f"{where}: there is no kind {choice!r}; {nearest(str(choice), kind.kinds)}")
        kind = kind.kinds[choice]
        table = {k: v for k, v in table.items() if k != "kind"}
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    for key in table:
        if key not in names:
            raise DescriptionError(f"{where}: there is no field {key!r}; {nearest(key, names)}")
    values: dict[str, Any] = {}
    for field in fields(kind):
        hint, place = hints[field.name], f"{where}, {field.name}"
        if hint is RopeParameters:
            limit = convert(settings.get("max_positions"), int, _key(settings, "max_positions"))
            values[field.name] = read_rope(settings, common().rope_types, limit)
        elif isinstance(hint, type) and (is_dataclass(hint) or issubclass(hint, Block)):
            if field.name not in table:
                raise DescriptionError(f"{where}: the table {field.name!r} is missing")
            values[field.name] = _fill(hint, table[field.name], settings, place)
        elif field.name in table:
            given = table[field.name]
            if isinstance(given, str) and hint is not str:
                place = _key(settings, given) if given in settings else place
                given = settings.evaluate(given, place)
            values[field.name] = _converted(given, hint, place)
        elif field.name in settings:
            values[field.name] = _converted(settings.get(field.name), hint, _key(settings, field.name))
        elif field.default is MISSING:
            raise DescriptionError(f"{where}: the field {field.name!r} is missing, and [config] does not name it")
    try:
        return kind(**values)
    except ConfigurationError as error:
        raise ConfigurationError(f"{settings.source}: {error}") from error


def _converted(value: Any, hint: Any, place: str) -> Any:
    """The value as a field's type has it; a size that may be absent (`int | None`) is so where it is 0."""
    if hint == int | None:
        return None if value == 0 and value is not False else convert(value, int, place)
    return convert(value, hint, place)


def _key(settings: Settings, name: str) -> str:
    return f"{settings.source}: {settings.origin(name)!r}"


def _check_layer_types(settings: Settings, num_layers: int) -> None:
    """Every layer is of the one kind that `[layer]` describes."""
    kinds = settings.take("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigurationError(f"{settings.source}: layer_types must be a list of {num_layers} names")
    for i, kind in enumerate(kinds):
        if kind not in ("full_attention", "attention"):
            raise ConfigurationError(
                f"{settings.source}: layer {i} is of type {str(kind)[:80]!r}; supported: 'full_attention'"
            )
