"""What a generation gives back."""

from __future__ import annotations

from dataclasses import dataclass, field

from .timings import Timings


@dataclass(frozen=True)
class Completion:
    """A finished continuation of one prompt; `str()` of it is its text.

    `text`: without the prompt, special tokens and a stop string; empty for a model without a tokenizer.
    `token_ids`: every generated token, without the prompt; an end token that was generated is the last of them.
    `finish_reason`: `stop` (an end token, a stop token or a stop string) or `length` (`max_new_tokens`, or the context
    is full). `seed`: what the draws were keyed by, given or chosen; None where nothing was drawn.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: Timings
    seed: int | None = None
    prompt_token_ids: list[int] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        return self.text


class Piece(str):
    """The text that became certain with one token: a `str` with its `token_id`.

    It is empty when the token completes no character, or may belong to a stop string. `finish_reason` is None but for
    the last piece of a stream.
    """

    __slots__ = ("finish_reason", "token_id")
    token_id: int
    finish_reason: str | None

    def __new__(cls, text: str, token_id: int, finish_reason: str | None = None) -> Piece:
        piece = super().__new__(cls, text)
        piece.token_id = token_id
        piece.finish_reason = finish_reason
        return piece
