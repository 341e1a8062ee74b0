"""Windows, caps, slopes, sinks and values of another width: exact, and the same bits however a sequence is cut.

What is before a window is NaN, and block tables name no blocks there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.backends.tvm.isa import ISAS, Isa
from llmc.backends.tvm.splits import SEGMENT
from tests.backends.tvm.machine import V3, needs_v3, runs_here, same_bits
from tests.backends.tvm.paged import Batch
from tests.tolerance import assert_as_good_as

pytestmark = needs_v3
BEST = [isa for isa in ISAS.values() if runs_here(isa)][-1]
EVERYTHING = {"window": 100, "soft_cap": 4.0, "alibi": True, "sinks": True, "value_dim": 24}

CASES: list[tuple[Isa, tuple[int, int], int, str, list[int], dict[str, Any], int]] = [
    (V3, (2, 2), 80, "f32", [40, 17], {"window": 16}, SEGMENT),
    (V3, (4, 2), 40, "f16", [SEGMENT + 40, 2 * SEGMENT + 3], {"window": SEGMENT}, SEGMENT),
    (BEST, (6, 2), 96, "bf16", [SEGMENT + 9, 33], {"window": SEGMENT + 1}, 2 * SEGMENT),
    (V3, (5, 1), 20, "i8", [3 * SEGMENT + 20, 21], {"window": SEGMENT - 1}, 2 * SEGMENT),
    (BEST, (8, 1), 64, "i8", [SEGMENT + 5, 300], {"window": 5}, SEGMENT),
    (V3, (3, 1), 16, "f32", [SEGMENT + 8, 20], {"window": 1}, SEGMENT),
    (BEST, (14, 2), 40, "f16", [2 * SEGMENT + 30], {"window": 3}, SEGMENT),
    (V3, (4, 1), 80, "f16", [50, 1], {"soft_cap": 1.5}, SEGMENT),
    (BEST, (2, 2), 96, "f32", [SEGMENT + 30, 5], {"alibi": True}, SEGMENT),
    (V3, (8, 8), 20, "i8", [30, 2 * SEGMENT + 30], {"sinks": True}, SEGMENT),
    (V3, (2, 1), 24, "f32", [SEGMENT + 2, 3], {"value_dim": 16}, SEGMENT),
    (BEST, (4, 4), 18, "i8", [SEGMENT + 2, 30], {"value_dim": 40}, 2 * SEGMENT),
    (V3, (6, 2), 40, "f16", [SEGMENT + 90, 2 * SEGMENT + 7], EVERYTHING, SEGMENT),
    (BEST, (7, 1), 80, "bf16", [3 * SEGMENT + 90, 7], EVERYTHING, 2 * SEGMENT),
]


def _named(case: tuple[Any, ...]) -> str:
    isa, heads, head_dim, dtype, _, kind, _ = case
    return f"{isa.name}-{heads[0]}x{heads[1]}-{head_dim}-{dtype}-" + "-".join(f"{n}{v}" for n, v in kind.items())


@pytest.mark.parametrize("case", CASES, ids=_named)
def test_kinds(case: tuple[Isa, tuple[int, int], int, str, list[int], dict[str, Any], int]) -> None:
    isa, heads, head_dim, dtype, lengths, kind, split = case
    batch = Batch(isa, *heads, head_dim, dtype, lengths, 1, head_dim // 4 * 2, "half", split, kind=kind)
    whole = batch.attend([(s, 0, n) for s, n in enumerate(lengths)], 2)
    truth, naive = (np.concatenate(rows) for rows in zip(*map(batch.expected, range(len(lengths))), strict=True))
    assert_as_good_as(whole, naive, truth)

    begin = np.cumsum([0, *lengths])
    window = kind.get("window", 0)
    for s, n in enumerate(lengths):
        for cut in {n // 3, n - 1, window, SEGMENT + 1, n - 7} & set(range(1, n)):
            assert same_bits(batch.attend([(s, cut, n - cut)], 3), whole[begin[s] + cut : begin[s] + n])
    order = list(reversed(range(len(lengths))))
    last = [(s, lengths[s] - 1) for s in order]
    for many in (1, 3, 7):
        rows, states = batch.decode(order, many)
        assert same_bits(rows, whole[[begin[s] + p for s, p in last]])
        for state, full in zip(states, batch.forgotten([s.array for s in batch.states], last), strict=True):
            state.check()
            assert same_bits(state.array, full)


def test_sinks_that_are_larger_than_all_scores() -> None:
    batch = Batch(V3, 2, 2, 12, "f32", [22], 0, kind={"sinks": True})
    batch.sinks[...] = 90.0, -90.0
    whole = batch.attend([(0, 0, 22)], 1)
    truth, naive = batch.expected(0)
    assert_as_good_as(whole, naive, truth)
    assert same_bits(batch.decode([0], 2)[0][0], whole[-1])


def test_later_keys_never_reach_a_row_with_a_cap() -> None:
    """Infinity and NaN at the last position of a prefill leave all rows before it as they were."""
    batch = Batch(V3, 2, 2, 12, "f32", [22], 0, kind={**EVERYTHING, "window": 9})
    clean = batch.attend([(0, 0, 22)], 1)
    block = batch.tables[0, 1]
    key, value = (s.array for s in batch.states)
    key[block, :, :, 5] = np.inf
    value[block, :, 5] = np.nan
    dirty = batch.attend([(0, 0, 22)], 1)
    assert same_bits(dirty[:-1], clean[:-1])
    assert np.isnan(dirty[-1]).all()
