"""Windows, soft caps and sinks of paged attention, against dense masks over each sequence alone; and what they cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.ir.op import Array
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.types import DType, TensorType
from tests.ir.example import f, i

HEADS, KV_HEADS, WIDTH, SIZE = 4, 2, 3, 4


def dense(q: Array, k: Array, v: Array, op: PagedAttention, sinks: Array) -> Array:
    """The last len(q) tokens of one sequence: q [t, heads, width], k and v [s, kv_heads, width], all at once.

    The sink is one more column of scores, dropped after the softmax."""
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) * op.scale
    if op.soft_cap:
        scores = np.tanh(scores / op.soft_cap) * op.soft_cap
    row, column = np.arange(len(k))[-len(q) :, None], np.arange(len(k))[None]
    hidden = (column > row) | (column <= row - op.window if op.window else False)
    scores[:, hidden] = -np.inf
    if op.sinks:
        scores = np.concatenate([scores, np.broadcast_to(sinks[:, None, None], (HEADS, len(q), 1))], axis=2)
    weights = np.exp(scores)
    weights /= weights.sum(axis=2, keepdims=True)
    mixed: Array = np.einsum("hts,shd->thd", weights[:, :, : len(k)], v)
    return mixed.reshape(len(q), -1)


@settings(max_examples=150)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 14)), min_size=1, max_size=3),
    window=st.integers(0, 12),
    soft_cap=st.sampled_from([0.0, 0.3, 30.0]),
    sinks=st.booleans(),
    scaled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_dense_masks(
    lengths: list[tuple[int, int]], window: int, soft_cap: float, sinks: bool, scaled: bool, seed: int
) -> None:
    """Ragged batches in shuffled blocks; blocks that no token sees are not owned by anyone: their entries in the table
    name a block of NaN, and what a seen block holds beyond the context is NaN too."""
    rng = np.random.default_rng(seed)
    op = PagedAttention(HEADS, KV_HEADS, WIDTH, 0.7, scaled, window=window, soft_cap=soft_cap, sinks=sinks)
    logits = rng.standard_normal(HEADS) * 3
    blocks = [-(-total // SIZE) for total, _ in lengths]
    free = list(rng.permutation(sum(blocks)))
    count = sum(blocks) + 1
    tables = np.full((len(lengths), max(blocks)), count - 1)
    key = np.full((count, KV_HEADS, WIDTH, SIZE), np.nan)
    value = np.full((count, KV_HEADS, SIZE, WIDTH), np.nan)
    scales = [rng.uniform(0.5, 2, (count, KV_HEADS, SIZE)) for _ in range(2 * scaled)]
    q, positions, starts, expected = [], [], [0], []
    for s, (total, wanted) in enumerate(lengths):
        new = min(total, wanted)
        k, v, mine = (
            rng.standard_normal((n, h, WIDTH)) for n, h in ((total, KV_HEADS), (total, KV_HEADS), (new, HEADS))
        )
        first = max(0, total - new + 1 - window) // SIZE if window else 0
        for place in range(first * SIZE, total):
            if place % SIZE == 0:
                tables[s, place // SIZE] = free.pop()
            block, offset = tables[s, place // SIZE], place % SIZE
            factors = [x[block, :, offset, None] for x in scales] or [np.ones((KV_HEADS, 1))] * 2
            key[block, :, :, offset], value[block, :, offset] = k[place] / factors[0], v[place] / factors[1]
        q.append(mine.reshape(new, -1))
        positions.append(np.arange(total - new, total))
        starts.append(starts[-1] + new)
        expected.append(dense(mine, k, v, op, logits))
    operands = [np.concatenate(q), key, value, *scales, np.concatenate(positions), np.array(starts), tables]
    (got,) = op.reference(*operands, *[logits] * sinks)
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=1e-9, atol=1e-12)


def types(tokens: int, sequences: int, blocks: int, sinks: bool = False) -> tuple[TensorType, ...]:
    states = (TensorType(DType.F16, (50, KV_HEADS, WIDTH, SIZE)), TensorType(DType.F16, (50, KV_HEADS, SIZE, WIDTH)))
    tables = i(tokens), i(sequences + 1), i(sequences, blocks)
    return f(tokens, HEADS * WIDTH), *states, *tables, *[f(HEADS)] * sinks


def small(tokens: int, sequences: int, blocks: int) -> int:
    """Bytes of queries and tables."""
    return 4 * (tokens * HEADS * WIDTH + tokens + sequences + 1 + sequences * blocks)


POSITION = 2 * 2 * KV_HEADS * WIDTH
"""Bytes of a position's keys and values."""


@pytest.mark.parametrize(
    ("tokens", "sequences", "blocks", "window", "read", "seen"),
    [
        (2, 2, 20, 0, 2 * 80, 80),
        (2, 2, 20, 10, 2 * 9 + 2, 10),
        (2, 2, 20, 1, 2, 1),
        (2, 2, 2, 10, 2 * 8, 8),
        (30, 2, 20, 10, 2 * 9 + 30, 10),
        (160, 2, 20, 70, 2 * 80, 70),
    ],
)
def test_a_window_limits_what_is_read(
    tokens: int, sequences: int, blocks: int, window: int, read: int, seen: int
) -> None:
    """Each sequence's tokens see their window together: window - 1 positions before them, and themselves."""
    cost = PagedAttention(HEADS, KV_HEADS, WIDTH, 1.0, window=window).cost(*types(tokens, sequences, blocks))
    assert cost.bytes_read == small(tokens, sequences, blocks) + read * POSITION
    assert cost.bytes_written == 4 * tokens * HEADS * WIDTH
    assert cost.flops == 4 * tokens * HEADS * WIDTH * seen


def test_what_caps_and_sinks_cost() -> None:
    plain = PagedAttention(HEADS, KV_HEADS, WIDTH, 1.0).cost(*types(2, 2, 5))
    capped = PagedAttention(HEADS, KV_HEADS, WIDTH, 1.0, soft_cap=5.0).cost(*types(2, 2, 5))
    sunk = PagedAttention(HEADS, KV_HEADS, WIDTH, 1.0, sinks=True).cost(*types(2, 2, 5, True))
    assert capped.flops - plain.flops == 3 * 2 * HEADS * 20
    assert capped.bytes == plain.bytes
    assert sunk.bytes_read - plain.bytes_read == 4 * HEADS
    assert sunk.flops == plain.flops
