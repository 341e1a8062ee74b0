"""From a conversation to the prompt that its model was trained on, by the package's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

from .arguments import flag
from .document import Field
from .errors import ModelError
from .template import Template

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A template's text, compiled at its first use, and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._lock = Lock()

    @cached_property
    def _template(self) -> Template:
        return Template(self._source)

    def render(
        self, messages: Any, tools: Any = None, add_generation_prompt: bool = True, variables: Any = None
    ) -> str:
        """The conversation as one text, ready to be encoded without special tokens.

        `messages`: a non-empty list of objects with a `role`; `tools`: a list of JSON schemas; `variables`: further
        names for the template, such as `{"enable_thinking": False}`. Raises `ValueError` for what the template refuses.
        """
        values = {
            **self._special_tokens,
            **_plain(variables or {}, "variables"),
            "messages": _messages(messages),
            "tools": _plain(tools, "tools"),
            "documents": None,
            "add_generation_prompt": flag("add_generation_prompt", add_generation_prompt),
        }
        with self._lock:
            return self._template.render(values)


def special_tokens(config: Field | None) -> dict[str, str]:
    """The named special tokens of a tokenizer_config.json, each a text or an object with the text as `content`."""
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        field = config.optional(name) if config else None
        if field and isinstance(field.value, dict):
            field = field.optional("content")
        if field:
            found[name] = field.text()
    return found


def template_source(file: str | None, config: Field | None) -> str | None:
    """The default chat template: of its own file, else of tokenizer_config.json (one text, or a list of named ones)."""
    field = config.optional("chat_template") if config else None
    if file is not None or field is None:
        return file
    if isinstance(field.value, str):
        return field.value
    named = {item.key("name").text(): item.key("template") for item in field.items()}
    return named["default"].text(1 << 20) if "default" in named else None


def _messages(given: Any) -> list[Any]:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Sequence) or not given:
        raise ValueError(f"messages: given {given!r:.60}, expected a non-empty list of {{'role': ..., 'content': ...}}")
    for i, message in enumerate(given):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}]: given {message!r:.60}, expected an object with a 'role' that is text")
    return list(_plain([dict(message) for message in given], "messages"))


def _plain(given: Any, name: str) -> Any:
    # A template sees copies made of plain data, never an object with methods of its own.
    try:
        return json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error}; expected what JSON can say") from error


def missing_template() -> ModelError:
    """The error of a package without a chat template."""
    return ModelError("the package has no chat template: use generate with a prompt in the model's own format")
