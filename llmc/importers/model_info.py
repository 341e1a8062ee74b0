"""What a package says about its model, and the tokenizer's files: read beside the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmc.importers.config import token_ids
from llmc.importers.json_file import ImportFailure, parse_json, read_bytes

MAX_TOKENIZER_BYTES = 256 << 20
MAX_SMALL_BYTES = 16 << 20
MAX_TEMPLATE_BYTES = 1 << 20
MAX_NUMBER = 1 << 53

_SAMPLING = ("do_sample", "max_new_tokens", "min_p", "repetition_penalty", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class ModelInfo:
    """The manifest's `model` and `generation`. `chat_templates` holds `default` and named ones."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_parameters: int
    max_sequence_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    add_bos: bool
    generation: Mapping[str, Any] = field(default_factory=dict)
    chat_templates: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SideFiles:
    """What stands beside a configuration: generation defaults, tokenizer files, chat templates."""

    generation: Mapping[str, Any]
    tokenizer_files: Mapping[str, bytes]
    tokenizer_config: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    chat_templates: Mapping[str, str]

    def special_ids(self, name: str, config: Mapping[str, Any], vocab_size: int, source: str) -> tuple[int, ...]:
        """Ids of `bos`, `eos` or `pad`: the generation configuration's, else the configuration's."""
        key = f"{name}_token_id"
        if self.generation.get(key) is not None:
            return token_ids(self.generation[key], vocab_size, f"generation_config.json: {key}")
        return token_ids(config.get(key), vocab_size, f"{source}: {key}")

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling defaults that are set: flags and finite numbers only."""
        given = {k: v for k in _SAMPLING if isinstance(v := self.generation.get(k), int | float)}
        return {k: v for k, v in given.items() if abs(v) < MAX_NUMBER}

    @property
    def add_bos(self) -> bool:
        """Whether a prompt begins with the beginning token: as configured, else when the tokenizer itself adds one."""
        stated = self.tokenizer_config.get("add_bos_token")
        if isinstance(stated, bool):
            return stated
        return "SpecialToken" in str(self.tokenizer.get("post_processor"))


def read_side_files(folder: Path) -> SideFiles:
    """Read what there is in a folder; every file is optional. Raises `ImportFailure` for one that is malformed."""
    files: dict[str, bytes] = {}

    def optional(name: str, limit: int, keep: bool) -> dict[str, Any]:
        path = folder / name
        if not path.exists():
            return {}
        data = read_bytes(path, limit)
        if keep:
            files[name] = data
        return parse_json(data, str(path))

    generation = optional("generation_config.json", MAX_SMALL_BYTES, keep=False)
    tokenizer = optional("tokenizer.json", MAX_TOKENIZER_BYTES, keep=True)
    if tokenizer and not isinstance(tokenizer.get("model"), dict):
        raise ImportFailure(f"{folder / 'tokenizer.json'} has no 'model': it is no tokenizer of the tokenizers library")
    tokenizer_config = optional("tokenizer_config.json", MAX_SMALL_BYTES, keep=bool(tokenizer))
    templates = _templates(folder, tokenizer_config)
    if tokenizer and "default" in templates:
        files["chat_template.jinja"] = templates["default"].encode()
    return SideFiles(generation, files, tokenizer_config, tokenizer, templates)


def _templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files first, then tokenizer_config.json's text or list of named texts."""
    found: dict[str, str] = {}
    stated = tokenizer_config.get("chat_template")
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    entries = [{"name": "default", "template": stated}] if isinstance(stated, str) else stated or []
    if not isinstance(entries, list):
        raise ImportFailure(f"{where} must be text or a list of named texts, given {type(stated).__name__}")
    for entry in entries:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str) or len(text) > MAX_TEMPLATE_BYTES:
            limit = f"a name and a template of at most {MAX_TEMPLATE_BYTES} characters"
            raise ImportFailure(f"{where}: an entry has {limit}, given {str(entry)[:80]!r}")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ImportFailure(f"{where}: the template {name[:80]!r} is no valid Unicode")
        found[name] = text
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path, name in [*((p, p.stem) for p in more), (folder / "chat_template.jinja", "default")]:
        if path.exists():
            try:
                found[name] = read_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ImportFailure(f"{path} is no UTF-8 text") from error
    return found
