"""Attention over pages against float64: shuffled and reused pages, what is nobody's full of NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llmc.ir.op import Emitter, Value
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.ops.cache import quantize_rows
from llmc.ir.types import DType, symbol
from tests.backends.triton.nodes import leaf, run_node, step_of

F32, F16, BF16, F8, I8 = DType.F32, DType.F16, DType.BF16, DType.F8E4M3, DType.I8
Array = npt.NDArray[Any]


class Pages:
    """Keys and values of sequences of given lengths, in shuffled pages; all other pages and places hold NaN.

    Entries of a block table beyond a sequence's pages name a page of NaN.
    """

    def __init__(self, op: PagedAttention, state: DType, size: int, lengths: list[int], seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        counts = [-(-n // size) for n in lengths]
        total = sum(counts) + 3
        order = random.permutation(total)
        nobody = int(order[-1])
        self.tables = np.full((len(lengths), max(counts) + 2), nobody, np.int32)
        heads, width = op.num_kv_heads, op.head_dim
        key = np.full((total, heads, width, size), np.nan, np.float32)
        value = np.full((total, heads, size, width), np.nan, np.float32)
        scales = np.full((2, total, heads, size), np.nan, np.float32)
        taken = 0
        for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            self.tables[sequence, :count] = order[taken : taken + count]
            taken += count
            own = np.random.default_rng((seed, sequence))  # the same whatever the other sequences are
            for position in range(length):
                block, offset = self.tables[sequence, position // size], position % size
                for which, where in ((0, key[block, :, :, offset]), (1, value[block, :, offset])):
                    rows = own.standard_normal((heads, width)).astype(np.float32)
                    if state is I8:
                        rows, scales[which, block, :, offset] = quantize_rows(rows)
                    where[:] = rows
        states = [key, value]
        if state is I8:
            states = [np.where(np.isnan(a), 127, a) for a in states] + list(scales)
        dtypes = [state, state, *([F32, F32] if state is I8 else [])]
        self.states = [d.store(a) for a, d in zip(states, dtypes, strict=True)]


def check(
    op: PagedAttention,
    dtype: DType,
    state: DType,
    lengths: list[int],
    new: list[int] | None = None,
    size: int = 16,
    longest: int = 512,
) -> Array:
    """Compare a step of the last `new` tokens of each sequence (one each: decode) with the reference."""
    pages = Pages(op, state, size, lengths)
    decode = new is None
    fresh = new or [1] * len(lengths)
    positions = np.concatenate([np.arange(n - f, n) for n, f in zip(lengths, fresh, strict=True)]).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(fresh)]).astype(np.int32)
    count = len(positions)
    random = np.random.default_rng(1)
    tokens, blocks = symbol("tokens"), symbol("num_blocks")
    sequences = tokens if decode else symbol("sequences")
    width = op.num_heads * op.head_dim
    q = leaf("q", dtype, (tokens, width))
    shapes = [(blocks, *a.shape[1:]) for a in pages.states]
    dtypes = [state, state, F32, F32]
    states = [leaf(f"state{i}", dtypes[i], shape) for i, shape in enumerate(shapes)]
    where, start = leaf("positions", DType.I32, (tokens,)), leaf("query_start", DType.I32, (sequences + 1,))
    tables = leaf("tables", DType.I32, (sequences, symbol("max_blocks")))
    slopes = [leaf("slopes", F32, (op.num_heads,))] if op.alibi else []
    sinks = [leaf("sinks", F32, (op.num_heads,))] if op.sinks else []
    values: dict[Value, Array] = {
        q: dtype.store(random.standard_normal((count, width)).astype(np.float32)),
        **dict(zip(states, pages.states, strict=True)),
        where: positions,
        start: starts,
        tables: pages.tables,
        **{s: random.uniform(0, 0.5, op.num_heads).astype(np.float32) for s in slopes},
        **{s: random.standard_normal(op.num_heads).astype(np.float32) for s in sinks},
    }
    node = Emitter().make(op, tuple(values))
    sizes = {"tokens": count, "sequences": len(lengths), "max_blocks": pages.tables.shape[1], "num_blocks": 1}
    # A bucket is larger than its step: programs beyond it must find nothing to do.
    step = step_of(count + 1, len(lengths) + 1, decode, longest)
    (given,) = run_node(node, step, values, sizes).values()
    (expected,) = op.reference(*(a.astype(v.type.dtype.oracle) for v, a in values.items()))
    naive = np.abs(_naive(op, values, dtype, decode) - expected).max()
    error = np.abs(given.astype(np.float64) - expected).max()
    assert error <= 2 * naive, f"{error:.2e}, and naively {naive:.2e}"
    return given


def _naive(op: PagedAttention, values: dict[Value, Array], dtype: DType, decode: bool) -> Array:
    """In f32, one product after the other; probabilities and results are rounded to the queries' dtype."""
    q, key, value, *rest = (
        a.astype(np.float32) if v.type.dtype.is_float or v.type.dtype is I8 else a for v, a in values.items()
    )
    scales, rest = (rest[:2], rest[2:]) if op.scaled else ([], rest)
    positions, starts, tables, *rest = rest
    slopes, sinks = rest[: op.alibi], rest[op.alibi :]
    size, group = key.shape[3], op.num_heads // op.num_kv_heads
    out = np.empty(q.shape, np.float32)
    for token, position in enumerate(positions):
        sequence = token if decode else int(np.searchsorted(starts, token, side="right")) - 1
        seen = np.arange(max(0, position + 1 - op.window) if op.window else 0, position + 1)
        block, offset = tables[sequence, seen // size], seen % size
        for head in range(op.num_heads):
            keys, theirs = key[block, head // group, :, offset], value[block, head // group, offset]
            if scales:
                keys = keys * scales[0][block, head // group, offset][:, None]
                theirs = theirs * scales[1][block, head // group, offset][:, None]
            part = slice(head * op.head_dim, (head + 1) * op.head_dim)
            scores = _in_turn(keys * q[token, part], 1) * np.float32(op.scale)
            if op.soft_cap:
                scores = np.float32(op.soft_cap) * np.tanh(scores / np.float32(op.soft_cap))
            if slopes:
                scores = scores + slopes[0][head] * (seen - position).astype(np.float32)
            sink = sinks[0][head : head + 1] if sinks else scores[:0]
            peak = np.concatenate([scores, sink]).max()
            weights = np.exp(scores - peak)
            total = weights.sum() + np.exp(sink - peak).sum()
            rounded = dtype.store(weights / total).astype(np.float32)
            out[token, part] = _in_turn(rounded[:, None] * dtype.store(theirs).astype(np.float32), 0)
    return dtype.store(out).astype(np.float64)


def _in_turn(products: Array, axis: int) -> Array:
    """Added up in f32, one after the other."""
    result: Array = np.add.accumulate(products, axis=axis, dtype=np.float32).take(-1, axis)
    return result


def attention(heads: int = 4, kv_heads: int = 2, head_dim: int = 64, **options: Any) -> PagedAttention:
    return PagedAttention(heads, kv_heads, head_dim, head_dim**-0.5, **options)


LENGTHS = [1, 16, 17, 130, 64]


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F16), (F16, F8), (BF16, F8), (BF16, I8), (F16, I8), (F32, I8)],
    ids=str,
)
def test_states_of_every_dtype(dtype: DType, state: DType) -> None:
    op = attention(scaled=state is I8)
    check(op, dtype, state, LENGTHS)
    check(op, dtype, state, [20, 33, 70], new=[20, 1, 65])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_heads_of_every_width(head_dim: int) -> None:
    check(attention(2, 1, head_dim), BF16, BF16, [70, 3])
    check(attention(2, 1, head_dim), F32, F32, [40, 21], new=[7, 21])


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (7, 1), (16, 2)])
def test_heads_that_share_keys(heads: int, kv_heads: int) -> None:
    check(attention(heads, kv_heads, 32), F32, F32, [70, 3])
    check(attention(heads, kv_heads, 32), F32, F32, [70, 3], new=[30, 3])


@pytest.mark.parametrize("size", [16, 32, 64])
def test_pages_of_every_size(size: int) -> None:
    check(attention(), F32, F32, [size - 1, size, size + 1, 3 * size], size=size)
    check(attention(), F32, F32, [size + 1, 3 * size], new=[size + 1, size], size=size)


@pytest.mark.parametrize(
    "options", [{"window": 40}, {"window": 1}, {"soft_cap": 2.0}, {"alibi": True}, {"sinks": True}], ids=str
)
def test_what_models_do_to_scores(options: dict[str, Any]) -> None:
    check(attention(**options), F32, F32, LENGTHS)
    check(attention(**options), F32, F32, [20, 150, 70], new=[20, 70, 1])


def test_windows_soft_caps_slopes_and_sinks_together() -> None:
    op = attention(8, 2, window=70, soft_cap=3.0, alibi=True, sinks=True)
    check(op, BF16, BF16, LENGTHS)
    check(op, BF16, BF16, [20, 150], new=[20, 70])


def test_sequences_without_new_tokens_at_the_end() -> None:
    check(attention(), F32, F32, [20, 5, 5], new=[20, 0, 0])


def test_a_context_in_one_split_and_in_many_is_the_same_function() -> None:
    # The longest context of the package decides into how many parts a context may be cut.
    check(attention(4, 1), F32, F32, [400, 31], longest=100)
    check(attention(4, 1), F32, F32, [400, 31], longest=4096)


def test_results_do_not_depend_on_the_sequences_beside() -> None:
    op = attention()
    assert np.array_equal(check(op, BF16, BF16, [130, 20])[0], check(op, BF16, BF16, [130, 70])[0])


@pytest.mark.parametrize("seed", range(3))
def test_many_tokens_of_several_chunks(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 200, 5)
    new = [int(random.integers(1, n + 1)) for n in lengths]
    check(attention(8, 4, 32), F32, F32, [int(n) for n in lengths], new=new)
