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
from llmc.runtime.kv_cache import most_blocks
from llmc.runtime.manifest import ModelFacts
from llmc.runtime.model import Model
from llmc.runtime.plan import FULL, LayerGroup, Limits, inputs_of, slot_inputs, table_inputs
from llmc.runtime.timings import Profile

Float64 = NDArray[np.float64]
WIDTH = 8


class TinyModel:
    """Embeddings, attention heads with position-dependent queries, an output matrix: all random, all fixed.

    There is one head for each of the `windows`; 0 sees everything.
    """

    def __init__(self, vocab_size: int, seed: int = 0, windows: tuple[int, ...] = (0,)) -> None:
        random = np.random.default_rng(seed)
        self.vocab_size = vocab_size
        self.windows = windows
        self.embedding, self.output = (random.normal(size=(vocab_size, WIDTH)) for _ in range(2))
        self.caches = random.normal(size=(len(windows), 2, vocab_size, WIDTH))
        """Each head's keys and values of every token."""

    def row(self, token: int, length: int, seen: list[tuple[Float64, Float64]]) -> NDArray[np.float32]:
        """Logits after a token, the last of `length`, given for each head keys and values of what it sees, [seen,
        WIDTH], its own included."""
        query, mixed = self.embedding[token] * (1 + 0.1 * length), self.embedding[token]
        for keys, values in seen:
            weights = np.exp(keys @ query - (keys @ query).max())
            mixed = mixed + weights @ values / weights.sum()
        logits: NDArray[np.float32] = (2.0 * self.output @ mixed).astype(np.float32)
        return logits

    def logits(self, token_ids: list[int]) -> NDArray[np.float32]:
        """All logits of a sequence, without a cache."""
        rows = []
        for i, token in enumerate(token_ids):
            spans = [token_ids[seen_from(i, window) : i + 1] for window in self.windows]
            rows.append(self.row(token, i + 1, [(c[0, s], c[1, s]) for c, s in zip(self.caches, spans, strict=True)]))
        return np.stack(rows)


def seen_from(position: int, window: int) -> int:
    """The first position that a token sees."""
    return max(0, position - window + 1) if window else 0


class FakeExecutor:
    """`batch.Executor` over a `TinyModel`. Checks that what it is given is within the contract."""

    def __init__(
        self,
        model: TinyModel,
        num_blocks: tuple[int, ...],
        block_size: int = 4,
        limits: Limits = Limits(16, 4, 4),  # noqa: B008 - frozen
        decode_tokens: int = 4,
    ) -> None:
        self.lock = RLock()
        self.model = model
        self.limits = limits
        self.samples_on_device = False
        self.block_size = block_size
        self.groups = tuple(LayerGroup(f"window_{w}", w) if w else FULL for w in model.windows)
        self.num_blocks = num_blocks
        self.vocab_size = model.vocab_size
        self.entry_tokens: Mapping[str, tuple[int, int]] = {"decode": (1, decode_tokens), "prefill": (1, limits.tokens)}
        self.caches = [np.full((2, count, block_size, WIDTH), np.nan) for count in num_blocks]
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
        arrays = {name: batch.input(name) for name in inputs_of(self.groups)}
        assert all(array is not None and array.dtype == np.int32 for array in arrays.values())
        self.batches.append((entry, batch))
        pages = [
            (arrays[slots], arrays[tables], cache)
            for slots, tables, cache in zip(
                slot_inputs(self.groups), table_inputs(self.groups), self.caches, strict=True
            )
        ]
        for (slots, tables, cache), entries in zip(pages, self.model.caches, strict=True):
            assert slots is not None and tables is not None and tables.shape == batch.block_tables.shape
            assert len(set(slots.tolist())) == tokens, "two tokens share a slot"
            cache[:, slots // self.block_size, slots % self.block_size] = entries[:, batch.token_ids]
        rows = {}
        for s in range(sequences):
            span = range(int(batch.query_start[s]), int(batch.query_start[s + 1]))
            for t in span:
                position = int(batch.positions[t])
                assert position == int(batch.positions[span[0]]) + t - span[0]
                seen = []
                for (slots, tables, cache), window in zip(pages, self.model.windows, strict=True):
                    assert slots is not None and tables is not None
                    assert slots[t] // self.block_size == tables[s, position // self.block_size]
                    places = np.arange(seen_from(position, window), position + 1)
                    keys, values = cache[:, tables[s, places // self.block_size], places % self.block_size]
                    seen.append((keys, values))
                rows[t] = self.model.row(int(batch.token_ids[t]), position + 1, seen)
        self._memory[:] = np.nan  # what was returned before is gone
        self._memory[:outputs] = [rows[int(t)] for t in batch.logit_rows]
        logits = self._memory[:outputs]
        assert np.isfinite(logits).all(), "a row depends on memory that its sequence does not own"
        return StepOutput(logits, logits.argmax(1).astype(np.int32))

    def copy_block(self, group: int, source: int, destination: int) -> None:
        self.caches[group][:, destination] = self.caches[group][:, source]

    def close(self) -> None:
        self.closed = True


def tiny(
    vocab_size: int = 31,
    context: int = 48,
    num_blocks: int | None = None,
    eos: tuple[int, ...] = (),
    limits: Limits = Limits(16, 4, 4),  # noqa: B008 - frozen
    windows: tuple[int, ...] = (0,),
    **parts: Any,
) -> Model:
    """A `Model` over a `FakeExecutor`, without a tokenizer unless one is given. `num_blocks` is that of layers that see
    everything; those with a window have as many as a package would."""
    groups = [LayerGroup(f"window_{w}", w) if w else FULL for w in windows]
    counts = [most_blocks(group, limits.sequences, -(-context // 4), limits.tokens, 4) for group in groups]
    if num_blocks is not None:
        counts[0] = num_blocks
    tiny_model = TinyModel(vocab_size, windows=windows)
    executor = FakeExecutor(tiny_model, tuple(counts), limits=limits, decode_tokens=limits.sequences)
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
    """(free, promised, all) blocks of the first group of layers."""
    blocks = model._engine.managers[0]
    return blocks.num_free, blocks.promised, blocks.num_blocks
