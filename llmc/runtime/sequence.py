"""A sequence of tokens with its keys and values: what generation, serving and speculation are built on."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Tokens
from types import TracebackType

import numpy as np

from .arguments import token_id_list
from .batch import Chunk, Int32, StepOutput
from .engine import Engine, as_token_array
from .errors import ModelError


class Sequence:
    """Tokens that the model has read, and the state after them.

        with model.sequence() as sequence:
            output = sequence.prefill(token_ids)            # output.logits f32[1, vocab], output.greedy i32[1]
            output = sequence.step(int(output.greedy[0]))
            other = sequence.fork()                         # shares the blocks until one of the two is written

    Errors, after which it holds what it held before: `ValueError` for bad token ids or more tokens than the context
    holds; `ModelError` when the key/value memory is full, when it cannot be rolled back so far (see `truncate`), after
    `free`, and after the model was closed.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        with engine.exclusive():
            self.table = engine.new_table()
        self._tokens: list[int] = []
        self._freed = False

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self.table.length

    @property
    def token_ids(self) -> list[int]:
        """The tokens it holds."""
        return self._tokens[: self.length]

    def prefill(self, token_ids: Tokens[int], outputs: int = 1) -> StepOutput:
        """Read tokens, in as few steps as the limits allow; gives rows for the last `outputs` of them."""
        ids = as_token_array(token_id_list(token_ids, self.engine.executor.vocab_size))
        if not 0 <= outputs <= len(ids):
            raise ValueError(f"outputs: given {outputs}, expected 0 to {len(ids)}, the number of tokens")
        vocab_size = self.engine.executor.vocab_size
        result = StepOutput(np.empty((outputs, vocab_size), np.float32), np.empty(outputs, np.int32))
        with self.engine.exclusive():
            self.check_room(len(ids))
            before, done = self.length, 0
            parts = list(split_chunks(self.engine, ids, outputs))
            # After one step what was seen before is still there; after several, layers with a window have forgotten it.
            kept = self.engine.keep_table(self.table) if len(parts) > 1 and before else None
            try:
                for part, wanted in parts:
                    self.begin(part)
                    rows = self.engine.forward([Chunk(self.table, part, wanted)])
                    result.logits[done : done + wanted], result.greedy[done : done + wanted] = rows.logits, rows.greedy
                    done += wanted
            except BaseException:
                if kept is None:
                    self.table.truncate(before)
                else:
                    self.table.restore(kept)
                raise
            finally:
                if kept is not None:
                    kept.free()
        return result

    def step(self, token_id: int) -> StepOutput:
        """Read one token; gives its row."""
        return self.prefill([token_id])

    def fork(self) -> Sequence:
        """Another sequence with the same tokens, at no cost until one of the two goes on."""
        with self.engine.exclusive():
            self.check_room(0)
            other = Sequence(self.engine)
            other.table = self.engine.fork_table(self.table)
            other._tokens = self.token_ids
        return other

    def truncate(self, length: int) -> None:
        """Roll back to the first `length` tokens.

        Layers with a sliding window forget what it has passed. So a sequence goes back from the longest that it was by
        as many tokens as a step has at most (`engine.max_tokens`), or to 0; else `ModelError` says how far it can. A
        fork that was made before still holds what it held.
        """
        if isinstance(length, bool) or not 0 <= length <= self.length:
            raise ValueError(f"length: given {length!r}, expected 0 to {self.length}, what the sequence holds")
        with self.engine.exclusive():
            self.table.truncate(length)

    def free(self) -> None:
        """Give its blocks back; nothing but `free` may follow."""
        self._freed = True
        if not self.engine.closed:
            with self.engine.exclusive():
                self.table.free()

    def begin(self, token_ids: Int32) -> None:
        """Note the tokens that the next step commits. What it does not commit is forgotten."""
        del self._tokens[self.length :]
        self._tokens += token_ids.tolist()

    def check_room(self, tokens: int) -> None:
        """Raise unless `tokens` more tokens fit into the context."""
        if self._freed:
            raise ModelError("the sequence was freed: start another one")
        if self.length + tokens > self.engine.max_sequence_length:
            raise ValueError(
                f"{self.length} tokens and {tokens} more do not fit: expected at most "
                f"{self.engine.max_sequence_length}, the context that the package was compiled for"
            )

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()


def split_chunks(engine: Engine, token_ids: Int32, outputs: int) -> Iterator[tuple[Int32, int]]:
    """Tokens cut into steps, each with how many of its last tokens are among the last `outputs` of all.

    A step takes at most `engine.max_tokens` tokens and gives at most as many rows as a step can.
    """
    done, first_output = 0, len(token_ids) - outputs
    while done < len(token_ids):
        stop = min(done + engine.max_tokens, len(token_ids))
        wanted = max(0, stop - max(done, first_output))
        excess = max(0, wanted - engine.executor.limits.outputs)
        yield token_ids[done : stop - excess], wanted - excess
        done = stop - excess
