"""What a user passes, checked: every mistake is a `ValueError` that says what was given and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

Prompt = Union[str, Sequence[int]]  # noqa: UP007 - evaluated at import, where Python 3.10 is to understand it

MAX_SEED = (1 << 64) - 1


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue a prompt; see `Model.generate` for what each one means. Construct it with `parse_options`."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None
    stop_strings: tuple[str, ...]
    stop_token_ids: frozenset[int]
    ignore_eos: bool

    @property
    def greedy(self) -> bool:
        """Whether the next token is the first maximum of the logits: temperature 0, by definition."""
        return self.temperature == 0.0

    @property
    def plain(self) -> bool:
        """Greedy on the logits as they are."""
        return self.greedy and self.repetition_penalty == 1.0


def parse_options(
    vocab_size: int,
    max_new_tokens: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    min_p: Any,
    repetition_penalty: Any,
    seed: Any,
    stop: Any,
    ignore_eos: Any,
) -> GenerationOptions:
    """Check every option. Raises `ValueError`."""
    strings, token_ids = _stop(stop, vocab_size)
    return GenerationOptions(
        max_new_tokens=integer("max_new_tokens", max_new_tokens, 1),
        temperature=_number("temperature", temperature, 0.0, math.inf),
        top_k=None if top_k is None else integer("top_k", top_k, 1, or_none=True),
        top_p=None if top_p is None else _number("top_p", top_p, 0.0, 1.0, above=True, or_none=True),
        min_p=None if min_p is None else _number("min_p", min_p, 0.0, 1.0, or_none=True),
        repetition_penalty=_number("repetition_penalty", repetition_penalty, 0.0, math.inf, above=True),
        seed=None if seed is None else integer("seed", seed, 0, MAX_SEED, or_none=True),
        stop_strings=strings,
        stop_token_ids=token_ids,
        ignore_eos=flag("ignore_eos", ignore_eos),
    )


def integer(name: str, given: Any, least: int, most: int | None = None, or_none: bool = False) -> int:
    """An integer in [least, most]; a bool is none. numpy's integers are welcome."""
    good = isinstance(given, int | np.integer) and not isinstance(given, bool)
    number = int(given) if good else least - 1
    if number < least or (most is not None and number > most):
        bounds = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
        raise ValueError(f"{name}: given {_show(given)}, expected {bounds}{' or None' if or_none else ''}")
    return number


def flag(name: str, given: Any) -> bool:
    """True or False, nothing that merely counts as such."""
    if not isinstance(given, bool | np.bool_):
        raise ValueError(f"{name}: given {_show(given)}, expected True or False")
    return bool(given)


def token_id_list(given: Any, vocab_size: int) -> list[int]:
    """A non-empty list (tuple, one-dimensional integer array or tensor) of token ids in range, as plain integers."""
    if hasattr(given, "tolist"):
        given = given.tolist() if getattr(given, "ndim", 1) == 1 else [given]
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise ValueError(f"token ids: given {_show(given)}, expected a list of integers")
    if len(given) == 0:
        raise ValueError("token ids: the list is empty, expected at least one")
    return [integer(f"token id at position {i}", item, 0, vocab_size - 1) for i, item in enumerate(given)]


def split_prompts(given: Any) -> tuple[list[Prompt], bool]:
    """The prompts of a call, and whether it was a single one: text, a list of ids, or a list of one of the two."""
    if isinstance(given, str):
        return [given], True
    if hasattr(given, "tolist"):  # an array of numpy, a tensor of torch
        given = given.tolist()
    if isinstance(given, bytes) or not isinstance(given, Sequence):
        raise ValueError(f"prompt: given {_show(given)}, expected text, a list of token ids, or a list of prompts")
    items = [item.tolist() if hasattr(item, "tolist") else item for item in given]
    if not items:
        raise ValueError("prompt: given an empty list, expected text, token ids, or a list of prompts")
    nested = [not isinstance(item, str | bytes) and isinstance(item, Sequence) for item in items]
    if all(isinstance(item, str) for item in items) or all(nested):
        return items, False
    if any(isinstance(item, str | bytes) for item in items) or any(nested):
        raise ValueError("prompt: given a list that mixes kinds, expected all text, all token ids, or all lists of ids")
    return [items], True


def _number(name: str, given: Any, least: float, most: float, above: bool = False, or_none: bool = False) -> float:
    good = isinstance(given, int | float | np.integer | np.floating) and not isinstance(given, bool)
    try:
        number = float(given) if good else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number) or number > most or number < least or (above and number == least):
        low = f"above {least:g}" if above else f"of at least {least:g}"
        high = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"{name}: given {_show(given)}, expected a number {low}{high}{' or None' if or_none else ''}")
    return number


def _stop(given: Any, vocab_size: int) -> tuple[tuple[str, ...], frozenset[int]]:
    if given is None:
        return (), frozenset()
    items = [given] if isinstance(given, str | int | np.integer) else given
    if isinstance(items, bytes) or not isinstance(items, Sequence):
        raise ValueError(f"stop: given {_show(given)}, expected text, a token id, a list of them, or None")
    strings = [item for item in items if isinstance(item, str)]
    if "" in strings:
        raise ValueError("stop: given an empty string, expected text of at least one character")
    ids = [integer("stop: token id", item, 0, vocab_size - 1) for item in items if not isinstance(item, str)]
    return tuple(strings), frozenset(ids)


def _show(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else text[:57] + "..."
