"""Attention over the paged state, whole and in splits: as exact as plain arithmetic, the same bits both ways."""

from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.isa import ISAS, Isa
from llmc.backends.tvm.splits import SEGMENT
from tests.backends.tvm.machine import V3, needs_v3, runs_here, same_bits
from tests.backends.tvm.paged import KV_DTYPES, Batch
from tests.tolerance import assert_as_good_as

pytestmark = needs_v3
HEADS = [(1, 1), (2, 2), (4, 2), (3, 1), (7, 1), (9, 3), (14, 2), (8, 1), (26, 2)]
HERE = [isa for isa in ISAS.values() if runs_here(isa)]


@settings(max_examples=12)
@given(
    isa=st.sampled_from(HERE),
    heads=st.sampled_from(HEADS),
    head_dim=st.sampled_from([8, 10, 12, 20, 64, 80, 100, 128, 256]),
    dtype=st.sampled_from(sorted(KV_DTYPES)),
    lengths=st.lists(st.sampled_from([1, 5, 16, 17, 33, 100]), min_size=1, max_size=3),
    rotated=st.sampled_from([0.0, 0.5, 1.0]),
    layout=st.sampled_from(["half", "interleaved"]),
    split=st.sampled_from([SEGMENT, 2 * SEGMENT]),
    tasks=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
@example(V3, (4, 2), 32, "f16", [SEGMENT + 3, 2 * SEGMENT + 40], 1.0, "half", SEGMENT, 2, 1)
@example(V3, (2, 2), 20, "f16", [2 * SEGMENT + 3, 4 * SEGMENT + 40], 1.0, "half", 2 * SEGMENT, 2, 1)
@example(HERE[-1], (3, 1), 64, "f16", [SEGMENT, 3 * SEGMENT + 7], 1.0, "half", SEGMENT, 5, 1)
@example(HERE[-1], (2, 2), 18, "bf16", [3 * SEGMENT - 1, 17], 0.5, "interleaved", 2 * SEGMENT, 3, 1)
@example(V3, (3, 1), 20, "i8", [SEGMENT + 30, 2 * SEGMENT + 17], 1.0, "half", SEGMENT, 3, 4)
@example(HERE[-1], (9, 3), 64, "i8", [SEGMENT + 30, 2 * SEGMENT + 40], 1.0, "half", 2 * SEGMENT, 2, 5)
@example(V3, (1, 1), 20, "f32", [SEGMENT + 1], 0.0, "half", SEGMENT, 3, 2)
@example(V3, (7, 1), 12, "bf16", [SEGMENT, 17], 0.0, "half", 2 * SEGMENT, 2, 3)
def test_attention(
    isa: Isa,
    heads: tuple[int, int],
    head_dim: int,
    dtype: str,
    lengths: list[int],
    rotated: float,
    layout: str,
    split: int,
    tasks: int,
    seed: int,
) -> None:
    rot_dim = int(head_dim * rotated) // 2 * 2
    batch = Batch(isa, *heads, head_dim, dtype, lengths, seed, rot_dim, layout, split)
    whole = batch.attend([(s, 0, n) for s, n in enumerate(lengths)], tasks)
    truth, naive = (np.concatenate(rows) for rows in zip(*map(batch.expected, range(len(lengths))), strict=True))
    assert_as_good_as(whole, naive, truth)

    # The same bits chunk by chunk, in another batch, and as decode steps of any number of tasks.
    begin = np.cumsum([0, *lengths])
    for s, n in enumerate(lengths):
        for cut in {n // 3, n - 1} - {0}:
            assert same_bits(batch.attend([(s, cut, n - cut)], 2), whole[begin[s] + cut : begin[s] + n])
    order = list(reversed(range(len(lengths))))
    for many in {1, tasks, 7}:
        last, states = batch.decode(order, many)
        assert same_bits(last, whole[[begin[s] + lengths[s] - 1 for s in order]])
        for state, full in zip(states, batch.states, strict=True):
            state.check()
            assert same_bits(state.array, full.array)


def test_later_keys_never_reach_a_row() -> None:
    """Infinity and NaN at the last position of a prefill leave all rows before it as they were."""
    batch = Batch(V3, 2, 2, 12, "f32", [22], 0)
    clean = batch.attend([(0, 0, 22)], 1)
    block = batch.tables[0, 1]
    key, value = (s.array for s in batch.states)
    key[block, :, :, 5] = np.inf
    value[block, :, 5] = np.nan
    dirty = batch.attend([(0, 0, 22)], 1)
    assert same_bits(dirty[:-1], clean[:-1])
    assert np.isnan(dirty[-1]).all()


def test_large_scores() -> None:
    """A softmax whose exponentials would overflow without the maximum."""
    batch = Batch(V3, 8, 4, 8, "f32", [100], 0, scale=1.0)
    batch.qkv[0] *= 100
    truth, naive = batch.expected(0)
    whole = batch.attend([(0, 0, 100)], 1)
    assert_as_good_as(whole, naive, truth)
    assert same_bits(batch.decode([0], 1)[0][0], whole[-1])
