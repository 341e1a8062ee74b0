"""One executor with its blocks and its lock: the place where sequences take their steps."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from .batch import Chunk, Executor, Int32, StepOutput, build_batch
from .errors import ModelError
from .kv_cache import BlockManager, BlockTable
from .timings import Profile


class Engine:
    """Steps over several sequences at a time, one step at a time whatever the number of threads.

    `max_sequence_length` bounds a sequence, in tokens. All use happens inside `exclusive`, which also repairs the
    bookkeeping after an interrupt: an exception inside leaves a mark, and whoever comes next counts the blocks anew
    from the tables that are still alive. So no handler has to run at a certain moment for the blocks to come back.
    """

    def __init__(self, executor: Executor, max_sequence_length: int) -> None:
        self.executor = executor
        self.max_sequence_length = max_sequence_length
        self.closed = False
        self._tables: weakref.WeakSet[BlockTable] = weakref.WeakSet()
        self._depth = 0
        self._interrupted = False
        least, self._decode_tokens = executor.entry_tokens["decode"]
        assert least == 1
        self._prefill_tokens = executor.entry_tokens["prefill"]
        limits = executor.limits
        self.max_sequences = min(limits.sequences, limits.outputs, self._decode_tokens, self._prefill_tokens[1])
        """The most sequences that decode together."""
        self.max_tokens = min(limits.tokens, self._prefill_tokens[1])
        """The most new tokens of one step."""
        self.managers = tuple(
            BlockManager(count, executor.block_size, group, self.max_tokens)
            for group, count in zip(executor.groups, executor.num_blocks, strict=True)
        )
        """The blocks of each group of layers."""

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock; may be nested. Raises `ModelError` when the model is closed."""
        with self.executor.lock:
            if self.closed:
                raise ModelError("the model is closed: load it again")
            depth = self._depth
            if depth == 0 and self._interrupted:
                self.reconcile()
            self._interrupted = True
            try:
                self._depth = depth + 1
                yield
            finally:
                self._depth = depth
            if depth == 0:
                self._interrupted = False

    def new_table(self) -> BlockTable:
        """The block table of a new, empty sequence."""
        table = BlockTable(self.managers)
        self._tables.add(table)
        return table

    def fork_table(self, table: BlockTable) -> BlockTable:
        """The table of a sequence that shares another's blocks."""
        other = table.fork()
        self._tables.add(other)
        return other

    def keep_table(self, table: BlockTable) -> BlockTable:
        """See `BlockTable.keep`."""
        kept = table.keep()
        self._tables.add(kept)
        return kept

    def reconcile(self) -> None:
        """Count the blocks anew: what a sequence held that is gone without `free` becomes free."""
        tables = list(self._tables)
        for i, manager in enumerate(self.managers):
            manager.reconcile([table.groups[i] for table in tables])

    def promise(self, table: BlockTable, tokens: int) -> bool:
        """Keep blocks back so that the sequence can reach `tokens` tokens; False where there are too few."""
        if table.promise(tokens):
            return True
        self.reconcile()
        return table.promise(tokens)

    def forward(self, chunks: Sequence[Chunk], profile: Profile | None = None) -> StepOutput:
        """One step. Gives views of the wanted rows, chunk after chunk, valid until the next step.

        The chunks are of different sequences and within the limits. Raises `ModelError` when the blocks run out.
        """
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        assert 0 < tokens <= self.max_tokens and len(chunks) <= self.executor.limits.sequences
        for chunk in chunks:
            self._extend(chunk)
        outputs = sum(chunk.outputs for chunk in chunks)
        batch = build_batch(chunks, self.executor.block_size)
        if outputs == 0:
            # A step always gives a row of logits; here nobody asked for one.
            batch = build_batch(
                [*chunks[:-1], Chunk(chunks[-1].table, chunks[-1].token_ids, 1)], self.executor.block_size
            )
        output = self.executor.step(self._entry(tokens, len(chunks)), batch, profile)
        for chunk in chunks:
            chunk.table.commit(len(chunk.token_ids))
        return output.rows(0, outputs)

    def discard(self, tables: Sequence[BlockTable]) -> None:
        """Free the tables of an abandoned generation.

        The garbage collector may be the one that abandons it, in the middle of another operation of this thread; then
        nothing is touched, and what the dead tables held comes back at the next `reconcile`.
        """
        with self.executor.lock:
            if self._depth == 0 and not self.closed:
                with self.exclusive():
                    for table in tables:
                        table.free()

    def close(self) -> None:
        """Close the executor; every later use raises `ModelError`. A second time does nothing."""
        with self.executor.lock:
            if not self.closed:
                self.closed = True
                self.executor.close()

    def _extend(self, chunk: Chunk) -> None:
        try:
            chunk.table.extend(len(chunk.token_ids), self.executor.copy_block)
        except ModelError:
            # Sequences that were dropped without `free` may still hold blocks.
            self.reconcile()
            chunk.table.extend(len(chunk.token_ids), self.executor.copy_block)

    def _entry(self, tokens: int, sequences: int) -> str:
        """Which entry point takes a step of this size."""
        if tokens == sequences and tokens <= self._decode_tokens:
            return "decode"
        least, most = self._prefill_tokens
        if not least <= tokens <= most:
            raise ModelError(f"no entry point of the package takes {tokens} tokens of {sequences} sequences")
        return "prefill"


def as_token_array(token_ids: Sequence[int]) -> Int32:
    """Token ids as a step takes them, i32[n]."""
    return np.array(token_ids, np.int32).reshape(-1)
