"""What a step takes and gives: ragged int32 inputs over several sequences, rows of logits out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from threading import RLock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .kv_cache import BlockTable
from .plan import LayerGroup, Limits, slot_inputs, table_inputs
from .timings import Profile

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

SAMPLING_WORDS = 8
"""The int32 words of a row of `Batch.sampling`."""


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence in a step, i32[n], n > 0; of the last `outputs` of them logits are wanted.

    `sampling`: how the device draws the token after each output, see `sampler.sampling_row`; None: the first maximum.
    """

    table: BlockTable
    token_ids: Int32
    outputs: int
    sampling: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Batch:
    """The int32 inputs of a step.

    `token_ids`, `positions`, `slot_mapping`: [tokens], all sequences' new tokens one after another, each with its
    position in its sequence and the slot (block * block_size + offset) that its key and value go to.
    `query_start`: [sequences + 1]; sequence s owns the tokens query_start[s]..query_start[s + 1].
    `block_tables`: [sequences, max_blocks]; entries past a sequence's length are arbitrary, and so are those before
    what a window shows.
    `logit_rows`: [outputs], which tokens' logits are wanted.
    `sampling`: [outputs, 8], how a device that samples draws the next token; None: the first maximum.
    `slot_mapping` and `block_tables` are those of the first group of layers; `others` are those of the other groups, by
    name (see `plan.inputs_of`).
    """

    token_ids: Int32
    positions: Int32
    slot_mapping: Int32
    query_start: Int32
    block_tables: Int32
    logit_rows: Int32
    sampling: Int32 | None = None
    others: Mapping[str, Int32] = field(default_factory=dict)

    def input(self, name: str) -> Int32 | None:
        """An input by its name in plans."""
        found: Int32 | None = self.others[name] if name in self.others else getattr(self, name)
        return found

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """tokens, sequences, max_blocks, outputs."""
        sequences, max_blocks = self.block_tables.shape
        return len(self.token_ids), sequences, max_blocks, len(self.logit_rows)


class StepOutput:
    """`logits` f32[outputs, vocab] and `greedy` i32[outputs], the first maximum of each row.

    `chosen` i32[outputs] are the tokens drawn as the batch's `sampling` says, None where the executor does not sample.
    What an executor returns are views of its own memory, valid until its next step. `logits` may be given as a
    function: then they are fetched when somebody reads them for the first time, which must be before the next step.
    """

    __slots__ = ("_logits", "chosen", "greedy")

    def __init__(self, logits: Float32 | Callable[[], Float32], greedy: Int32, chosen: Int32 | None = None) -> None:
        self._logits = logits
        self.greedy = greedy
        self.chosen = chosen

    @property
    def logits(self) -> Float32:
        """The rows of logits, f32[outputs, vocab]."""
        if callable(self._logits):
            self._logits = self._logits()
        return self._logits

    def copy(self) -> StepOutput:
        """The same values in memory of their own."""
        return StepOutput(self.logits.copy(), self.greedy.copy(), None if self.chosen is None else self.chosen.copy())

    def rows(self, start: int, stop: int) -> StepOutput:
        """A range of rows, as views."""
        logits = (lambda: self.logits[start:stop]) if callable(self._logits) else self._logits[start:stop]
        return StepOutput(logits, self.greedy[start:stop], None if self.chosen is None else self.chosen[start:stop])


class Executor(Protocol):
    """Runs steps of one compiled model. Whoever calls `step` holds `lock` until it is done with the output."""

    lock: RLock
    limits: Limits
    block_size: int
    groups: tuple[LayerGroup, ...]
    num_blocks: tuple[int, ...]
    """The number of blocks that each group of layers has."""
    vocab_size: int
    entry_tokens: Mapping[str, tuple[int, int]]
    """The least and the most tokens that each entry point takes, inclusive."""
    samples_on_device: bool
    """Whether its steps draw the next tokens: `StepOutput.chosen`, by `Batch.sampling`."""

    def step(self, entry: str, batch: Batch, profile: Profile | None = None) -> StepOutput:
        """Append the batch's tokens and compute the wanted logits."""

    def copy_block(self, group: int, source: int, destination: int) -> None:
        """Copy a whole block of every state of a group of layers, given by its number."""

    def close(self) -> None:
        """Give the memory and the threads back; no step may follow."""


def build_batch(chunks: Sequence[Chunk], block_size: int) -> Batch:
    """The inputs for chunks whose tables already have blocks for the new tokens (`BlockTable.extend`)."""
    starts = [0, *accumulate(len(chunk.token_ids) for chunk in chunks)]
    positions = np.empty(starts[-1], np.int32)
    rows: list[int] = []
    for chunk, start, stop in zip(chunks, starts, starts[1:], strict=False):
        position = chunk.table.length
        if stop - start == 1:  # decoding: worth a branch of its own, this runs for every token of every sequence
            positions[start] = position
        else:
            positions[start:stop] = np.arange(position, position + stop - start, dtype=np.int32)
        rows += range(stop - chunk.outputs, stop)
    slots, tables = _pages(chunks, starts, positions, block_size)
    groups = [group.manager.group for group in chunks[0].table.groups]
    others = {
        **dict(zip(slot_inputs(groups)[1:], slots[1:], strict=True)),
        **dict(zip(table_inputs(groups)[1:], tables[1:], strict=True)),
    }
    token_ids = chunks[0].token_ids if len(chunks) == 1 else np.concatenate([chunk.token_ids for chunk in chunks])
    query_start, logit_rows = np.array(starts, np.int32), np.array(rows, np.int32)
    return Batch(token_ids, positions, slots[0], query_start, tables[0], logit_rows, _sampling(chunks), others)


def _pages(
    chunks: Sequence[Chunk], starts: Sequence[int], positions: Int32, block_size: int
) -> tuple[list[Int32], list[Int32]]:
    """slot_mapping and block_tables of each group of layers; all tables have the same width."""
    width = max(len(group.blocks) for chunk in chunks for group in chunk.table.groups)
    slots, tables = [], []
    for number in range(len(chunks[0].table.groups)):
        slot_mapping = np.empty(len(positions), np.int32)
        block_tables = np.zeros((len(chunks), width), np.int32)
        for s, (chunk, start, stop) in enumerate(zip(chunks, starts, starts[1:], strict=False)):
            blocks, position = chunk.table.groups[number].blocks, chunk.table.length
            block_tables[s, : len(blocks)] = blocks
            if stop - start == 1:  # see `build_batch`
                slot_mapping[start] = int(blocks[position // block_size]) * block_size + position % block_size
            else:
                span = positions[start:stop]
                slot_mapping[start:stop] = blocks[span // block_size] * block_size + span % block_size
        slots.append(slot_mapping)
        tables.append(block_tables)
    return slots, tables


def _sampling(chunks: Sequence[Chunk]) -> Int32 | None:
    """The rows that say how to draw, i32[outputs, 8]; zeros for the first maximum."""
    if all(chunk.sampling is None for chunk in chunks):
        return None
    return np.array(
        [chunk.sampling or (0,) * SAMPLING_WORDS for chunk in chunks for _ in range(chunk.outputs)], np.int32
    )
