"""Text to token ids and back, by the package's tokenizer.json; and text piece by piece while tokens arrive."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend

from .arguments import integer
from .errors import ModelError

REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """A tokenizer of the tokenizers library, with the special tokens that a prompt gets.

    A prompt gets what the file's own post-processor adds, as in transformers; with `add_bos` it gets the beginning
    token `bos_token_id` also where the post-processor adds none.
    """

    def __init__(self, backend: Backend, bos_token_id: int | None = None, add_bos: bool = False) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bos = [] if bos_token_id is None else [bos_token_id]
        own = backend.encode("").ids[:1] == self._bos != []
        self._prepend = self._bos if add_bos and not own else []
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._texts: dict[int, str | None] = {}

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows; a model may have more rows than that."""
        return int(self._backend.get_vocab_size())

    @property
    def adds_bos(self) -> bool:
        """Whether `encode` puts the beginning token first."""
        return bool(self._bos) and self.encode("")[:1] == self._bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that a prompt starts (or ends) with unless told otherwise."""
        if not isinstance(text, str):
            raise ValueError(f"text: given {type(text).__name__}, expected str")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text: character {error.start} is half a surrogate pair, expected valid Unicode"
            ) from error
        ids = list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        return self._prepend + ids if add_special_tokens else ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. An id that the tokenizer does not know (a padded vocabulary has some) has no text."""
        ids = [integer("token id", item, 0, (1 << 32) - 1) for item in token_ids]
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name, such as `</s>`."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def has_text(self, token_id: int) -> bool:
        """Whether the token may add to a text: it is known and not special."""
        return token_id not in self.special_ids and self._backend.id_to_token(token_id) is not None

    def whole_text(self, token_id: int) -> str | None:
        """The text of a token alone; None for one without text and for one that is a part of a character."""
        if token_id not in self._texts:
            whole = self.has_text(token_id) and token_id not in self.byte_ids
            text = self.decode_known([token_id]) if whole else REPLACEMENT
            self._texts[token_id] = None if REPLACEMENT in text else text
        return self._texts[token_id]

    def decode_known(self, token_ids: list[int]) -> str:
        """`decode` for ids that are known to be such."""
        return str(self._backend.decode(token_ids))

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Tokens such as `<0x0A>` that stand for one byte; a run of them is decoded as a whole."""
        found = []
        for byte in range(256):
            token_id = self.token_to_id(f"<0x{byte:02X}>")
            if token_id is not None and not _BYTE_TOKEN.fullmatch(self.decode([token_id])):
                found.append(token_id)
        return frozenset(found)


class Detokenizer:
    """The text of a completion, piece by piece; the pieces and `flush` together are

    `decode(prompt + completion)` without `decode(prompt)`, special tokens skipped. So a completion keeps the space
    that separates it from its prompt, which a sentencepiece tokenizer would strip if it decoded the completion alone.

    A piece never ends within a character. Bytes of a byte-fallback tokenizer are held until the run of them ends,
    because the tokenizer decodes a run that is no UTF-8 to replacement characters altogether.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # One token of the prompt stands for all: what matters to a decoder is only that ours are not the first.
        self._anchor = next(([i] for i in reversed(prompt) if tokenizer.whole_text(i) is not None), [])
        self._anchor_length = len(tokenizer.decode_known(self._anchor))
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; often all of it, sometimes none."""
        if not self._tokenizer.has_text(token_id):
            return ""
        self._pending.append(token_id)
        if token_id in self._tokenizer.byte_ids:
            return ""
        text = self._window()
        if text.endswith(REPLACEMENT):
            return ""
        return self._emit(text)

    def flush(self) -> str:
        """What is still held, as it would be decoded if nothing followed."""
        return self._emit(self._window()) if self._pending else ""

    def _window(self) -> str:
        return self._tokenizer.decode_known(self._anchor + self._pending)

    def _emit(self, text: str) -> str:
        piece = text[self._anchor_length :]
        last = self._tokenizer.whole_text(self._pending[-1])
        if last is not None:
            self._anchor, self._anchor_length = self._pending[-1:], len(last)
        elif not self._anchor:
            self._anchor, self._anchor_length = self._pending, len(text)
        self._pending = []
        return piece


def load_tokenizer(path: Path, bos_token_id: int | None, add_bos: bool) -> Tokenizer:
    """Read a tokenizer.json; raises `ModelError` when the library does not understand it."""
    try:
        backend = Backend.from_file(str(path))
        return Tokenizer(backend, bos_token_id, add_bos)
    except Exception as error:  # the library raises bare Exceptions
        raise ModelError(f"{path}: {error}; the tokenizers library of this machine does not read it") from error
