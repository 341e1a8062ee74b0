"""A tiny language model in numpy with real paged keys and values, for tests of everything around the kernels.

It reads context through the block tables only, out of memory that starts as NaN and that other sequences share, so a
mistake of the allocator shows in the logits. A row is computed on its own, so results do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.runtime.batch import Batch, StepOutput
from llmc.runtime.manifest import ModelFacts
from llmc.runtime.model import Model
from llmc.runtime.plan import FULL, LayerGroup, Limits
from llmc.runtime.timings import Profile

Float64 = NDArray[np.float64]
WIDTH = 8


class TinyModel:
    """Embeddings, one attention head with position-dependent queries, an output matrix: all random, all fixed."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.vocab_size = vocab_size
        self.embedding, self.keys, self.values, self.output = (
            random.normal(size=(vocab_size, WIDTH)) for _ in range(4)
        )

    def row(self, token: int, keys: Float64, values: Float64) -> NDArray[np.float32]:
        """Logits after a token, given keys and values of its whole context, [context, WIDTH], its own included."""
        query = self.embedding[token] * (1 + 0.1 * len(keys))
        weights = np.exp(keys @ query - (keys @ query).max())
        mixed = weights @ values / weights.sum() + self.embedding[token]
        logits: NDArray[np.float32] = (2.0 * self.output @ mixed).astype(np.float32)
        return logits

    def logits(self, token_ids: list[int]) -> NDArray[np.float32]:
        """All logits of a sequence, without a cache."""
        keys, values = self.keys[token_ids], self.values[token_ids]
        return np.stack([self.row(t, keys[: i + 1], values[: i + 1]) for i, t in enumerate(token_ids)])


class FakeExecutor:
    """`batch.Executor` over a `TinyModel`. Checks that what it is given is within the contract."""

    def __init__(
        self,
        model: TinyModel,
        num_blocks: int,
        block_size: int = 4,
        limits: Limits = Limits(16, 4, 4),  # noqa: B008 - frozen
        decode_tokens: int = 4,
    ) -> None:
        self.lock = RLock()
        self.model = model
        self.limits = limits
        self.samples_on_device = False
        self.block_size = block_size
        self.groups: tuple[LayerGroup, ...] = (FULL,)
        self.num_blocks: tuple[int, ...] = (num_blocks,)
        self.vocab_size = model.vocab_size
        self.entry_tokens: Mapping[str, tuple[int, int]] = {"decode": (1, decode_tokens), "prefill": (1, limits.tokens)}
        self.cache = np.full((2, num_blocks, block_size, WIDTH), np.nan)
        self.batches: list[tuple[str, Batch]] = []
        self.closed = False
        self.fail_at: int | None = None
        self._memory = np.zeros((limits.outputs, self.vocab_size), np.float32)

    def step(self, entry: str, batch: Batch, profile: Profile | None = None) -> StepOutput:
        assert not self.closed
        if self.fail_at == len(self.batches):
            self.fail_at = None
            raise KeyboardInterrupt
        tokens, sequences, _, outputs = batch.dims
        least, most = self.entry_tokens[entry]
        assert least <= tokens <= most and 1 <= sequences <= self.limits.sequences
        assert 1 <= outputs <= self.limits.outputs
        assert entry != "decode" or tokens == sequences
        assert all(getattr(batch, name).dtype == np.int32 for name in ("token_ids", "positions", "slot_mapping"))
        assert len(set(batch.slot_mapping.tolist())) == tokens, "two tokens share a slot"
        self.batches.append((entry, batch))
        self.cache[:, batch.slot_mapping // self.block_size, batch.slot_mapping % self.block_size] = (
            self.model.keys[batch.token_ids],
            self.model.values[batch.token_ids],
        )
        rows = {}
        for s in range(sequences):
            span = range(int(batch.query_start[s]), int(batch.query_start[s + 1]))
            for t in span:
                position = int(batch.positions[t])
                assert position == int(batch.positions[span[0]]) + t - span[0]
                assert batch.slot_mapping[t] // self.block_size == batch.block_tables[s, position // self.block_size]
                places = np.arange(position + 1)
                blocks = batch.block_tables[s, places // self.block_size]
                keys, values = self.cache[:, blocks, places % self.block_size]
                rows[t] = self.model.row(int(batch.token_ids[t]), keys, values)
        self._memory[:] = np.nan  # what was returned before is gone
        self._memory[:outputs] = [rows[int(t)] for t in batch.logit_rows]
        logits = self._memory[:outputs]
        assert np.isfinite(logits).all(), "a row depends on memory that its sequence does not own"
        return StepOutput(logits, logits.argmax(1).astype(np.int32))

    def copy_block(self, group: int, source: int, destination: int) -> None:
        self.cache[:, destination] = self.cache[:, source]

    def close(self) -> None:
        self.closed = True


def tiny(
    vocab_size: int = 31,
    context: int = 48,
    num_blocks: int | None = None,
    eos: tuple[int, ...] = (),
    limits: Limits = Limits(16, 4, 4),  # noqa: B008 - frozen
    **parts: Any,
) -> Model:
    """A `Model` over a `FakeExecutor`, without a tokenizer unless one is given."""
    blocks = limits.sequences * -(-context // 4) if num_blocks is None else num_blocks
    executor = FakeExecutor(TinyModel(vocab_size), blocks, limits=limits, decode_tokens=limits.sequences)
    return Model(executor, ModelFacts("tiny", vocab_size, context, None, eos, False), **parts)


def executor_of(model: Model) -> FakeExecutor:
    """The fake below a model that `tiny` made."""
    executor = model._engine.executor
    assert isinstance(executor, FakeExecutor)
    return executor


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """The greedy continuation, computed without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(executor_of(model).model.logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


def free_blocks(model: Model) -> tuple[int, int, int]:
    """(free, promised, all) blocks."""
    (blocks,) = model._engine.managers
    return blocks.num_free, blocks.promised, blocks.num_blocks
