"""Descriptions: reading a family's TOML, finding the one for a `model_type`, applying it to a configuration."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from llmc.architectures.blocks import Layer
from llmc.architectures.expression import names, shown
from llmc.architectures.fill import DescriptionError, Filler, merged
from llmc.architectures.model import Model
from llmc.architectures.rope import RopeType
from llmc.architectures.settings import LAYER, ConfigurationError, Rule, Settings, convert
from llmc.ir.errors import nearest

_BLOCK_TABLES = ("embedding", "positions", "layer", "final_norm", "head")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Common:
    """What configurations of all families share (common.toml)."""

    harmless: tuple[str, ...]
    neutral: Mapping[str, list[Any]]
    rope_types: Mapping[str, RopeType]
    missing_blocks: Mapping[str, str]


@dataclass(frozen=True)
class Description:
    """A model family: which blocks, how their values are read from a configuration, how weights are named."""

    source: str
    model_types: tuple[str, ...]
    ignored: tuple[str, ...]
    unused_tensors: tuple[str, ...]
    optional_prefix: str
    neutral: Mapping[str, list[Any]]
    requires: tuple[str, ...]
    rules: Mapping[str, Rule]
    own_rules: tuple[str, ...]
    blocks: Mapping[str, Any]

    def apply(self, config: Mapping[str, Any], source: str) -> Model:
        """The model that a configuration (read from `source`) describes.

        Raises `ConfigurationError` for a value that is missing or wrong, and for a key that is not understood.
        """
        shared = common()
        settings = Settings(config, source, self.rules)
        filler = Filler(settings, shared.rope_types)
        stem = {name: table for name, table in self.blocks.items() if name != "layer"}
        model = filler.fill(Model, stem, self.source)
        assert isinstance(model, Model)
        model = replace(model, layers=tuple(self._layer(filler, i) for i in range(model.num_layers)))
        for condition in self.requires:
            self._check(settings, condition)
        _check_layer_types(settings, model.num_layers)
        if idle := sorted(set(self.own_rules) - settings.used):
            raise DescriptionError(f"{self.source}, [config]: no block uses {', '.join(idle)}")
        neutral = {**shared.neutral, **self.neutral}
        settings.check_understood((*shared.harmless, *self.ignored), neutral, self.model_types[0])
        return model

    def unused(self, model: Model) -> tuple[str, ...]:
        """Patterns of tensors that a checkpoint may have and nothing reads; `{num_layers}` is the number of layers."""
        return tuple(pattern.replace("{num_layers}", str(model.num_layers)) for pattern in self.unused_tensors)

    def _layer(self, filler: Filler, number: int) -> Layer:
        where = f"{self.source}, layer"
        if "layer" not in self.blocks:
            raise DescriptionError(f"{self.source}: the table 'layer' is missing")
        with filler.settings.at_layer(number):
            layer = filler.fill(Layer, filler.choose(Layer, self.blocks["layer"], where), where)
        assert isinstance(layer, Layer)
        return layer

    def _check(self, settings: Settings, condition: str) -> None:
        if not convert(settings.evaluate(condition, f"{self.source}, requires"), bool, f"{self.source}, requires"):
            given = ", ".join(f"{n} = {shown(settings.get(n))}" for n in sorted(names(condition)))
            raise ConfigurationError(
                f"{settings.source}: the blocks of {self.model_types[0]!r} compute this only where {condition}; given"
                f" {given}"
            )


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
    return Common(tuple(table["harmless"]), table["neutral"], types, table["missing_blocks"])


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
        raise ConfigurationError(f"{source}: the key 'model_type' is missing; it says which description is meant")
    if not isinstance(model_type, str) or model_type not in known:
        given, missing = str(model_type)[:80], common().missing_blocks
        why = f"no block computes {missing[given]}" if given in missing else nearest(given, known)
        raise ConfigurationError(
            f"{source}: the model type {given!r} has no description; {why} (--architecture takes one of yours,"
            " docs/architectures.md shows how)"
        )
    return known[model_type]


def parse_description(data: bytes, source: str) -> Description:
    """Read a description's TOML. Raises `DescriptionError`."""
    if len(data) > _MAX_BYTES:
        raise DescriptionError(f"{source}: a description has at most {_MAX_BYTES} bytes")
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise DescriptionError(f"{source} is no TOML: {error}") from error
    texts = ("model_types", "ignored", "unused_tensors", "requires")
    known = (*texts, "extends", "optional_prefix", "neutral", "config", *_BLOCK_TABLES)
    for key in table:
        if key not in known:
            raise DescriptionError(f"{source}: there is no table or key {key!r}; {nearest(key, known)}")
    inherited = _rules(_base(table, source).get("config", {}), source)
    table = _extended(_base(table, source), table)
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
    _check_names(rules, source)
    blocks = {k: table[k] for k in _BLOCK_TABLES if k in table}
    _, ignored, unused, requires = (_texts(table, name, source) for name in texts)
    own = tuple(name for name in rules if rules[name] != inherited.get(name))
    return Description(source, model_types, ignored, unused, prefix, neutral, requires, rules, own, blocks)


def _base(table: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The description that a description extends, whole, without its model types."""
    name = table.get("extends")
    if name is None:
        return {}
    files = {f.name: f for f in resources.files(__package__).iterdir() if f.name.endswith(".toml")}
    known = sorted(n.removesuffix(".toml") for n in files if n != "common.toml")
    if name not in known:
        raise DescriptionError(f"{source}: there is no description {name!r} to extend; {nearest(str(name), known)}")
    base = tomllib.loads(files[f"{name}.toml"].read_text(encoding="utf-8"))
    whole = _extended(_base(base, f"{name}.toml"), base)
    return {k: v for k, v in whole.items() if k not in ("model_types", "extends")}


def _extended(base: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """A description laid over another; a `[config]` value is said anew as a whole."""
    whole = merged(base, table)
    rules = base.get("config", {}), table.get("config", {})
    if all(isinstance(part, dict) for part in rules):
        whole["config"] = {**rules[0], **rules[1]}
    return whole


def _texts(table: Mapping[str, Any], key: str, source: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise DescriptionError(f"{source}: {key!r} must be a list of texts")
    return tuple(value)


def _rules(table: Any, source: str) -> dict[str, Rule]:
    """The `[config]` table: a value is a key's name, or a table with `key`, and `default` or `otherwise`."""
    if not isinstance(table, dict):
        raise DescriptionError(f"{source}: 'config' must be a table")
    return {name: _rule(name, entry, f"{source}, [config], {name!r}") for name, entry in table.items()}


def _check_names(rules: Mapping[str, Rule], source: str) -> None:
    """Every `otherwise` asks for values that there are, whether or not a configuration at hand comes to it."""
    for name, rule in rules.items():
        for asked in sorted(names(rule.otherwise or "") - {LAYER, *rules}):
            raise DescriptionError(
                f"{source}, [config], {name!r}: [config] names no value {asked!r}; {nearest(asked, rules)}"
            )
        for word, value in (("default", rule.default), ("null", rule.null)):
            if isinstance(value, str) and value in rules:
                raise DescriptionError(
                    f"{source}, [config], {name!r}: {word!r} is taken as it stands, as the text {value!r}; the value of"
                    " that name takes 'otherwise'"
                )


def _rule(name: str, entry: Any, where: str) -> Rule:
    entry = {"key": entry} if isinstance(entry, str) else entry
    allowed = ("key", "default", "null", "otherwise", "per_layer")
    if isinstance(entry, dict) and (wrong := sorted(set(entry) - set(allowed))):
        raise DescriptionError(f"{where}: there is no {wrong[0]!r}; {nearest(wrong[0], allowed)}")
    if not isinstance(entry, dict) or not {"key", "otherwise"} & set(entry):
        raise DescriptionError(f"{where} must be a key's name or {{ key, default | otherwise, null, per_layer }}")
    if name == LAYER:
        raise DescriptionError(f"{where}: {LAYER!r} is the number of a layer already")
    keys = entry.get("key", [])
    keys = keys if isinstance(keys, list) else [keys]
    default, otherwise, per_layer = entry.get("default"), entry.get("otherwise"), entry.get("per_layer", False)
    if ("key" in entry and not keys) or not all(isinstance(k, str) for k in keys):
        raise DescriptionError(f"{where}: 'key' must be text or a list of texts")
    if default is not None and not isinstance(default, bool | int | float | str | list):
        raise DescriptionError(f"{where}: 'default' must be a number, a flag, text or a list")
    if otherwise is not None and (not isinstance(otherwise, str) or default is not None):
        raise DescriptionError(f"{where}: 'otherwise' must be an expression, without a 'default'")
    if not isinstance(per_layer, bool):
        raise DescriptionError(f"{where}: 'per_layer' must be true or false")
    return Rule(tuple(keys), default, otherwise, per_layer, entry.get("null"))


def _check_layer_types(settings: Settings, num_layers: int) -> None:
    """Every layer is of the one kind that `[layer]` describes."""
    if any("layer_types" in rule.keys for rule in settings.rules.values()):
        return
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
