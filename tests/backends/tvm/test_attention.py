"""Appending to the paged state and attending to it, over shuffled, reused block tables whose other blocks are NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.kernels.attention import SEGMENT, paged_attention
from llmc.backends.tvm.kernels.cache import append, rope_append
from tests.backends.tvm.machine import DTYPES, V3, Array, Guarded, Kernel, f32, f64, needs_v3, same_bits, stored
from tests.tolerance import assert_as_good_as

pytestmark = needs_v3
BLOCK = 16


@dataclass
class Cache:
    """Keys and values of some sequences: f32 [length, kv_heads, head_dim] each, and the paged state that holds them."""

    keys: list[Array]
    values: list[Array]
    key: Array
    value: Array
    tables: Array


def make_cache(rng: np.random.Generator, lengths: list[int], kv_heads: int, head_dim: int, dtype: str) -> Cache:
    """Random keys and values, rounded to the storage dtype; blocks in random order, all else NaN."""
    keys, values = ([stored(rng.standard_normal((n, kv_heads, head_dim)), dtype) for n in lengths] for _ in range(2))
    needed = [-(-n // BLOCK) for n in lengths]
    total, width = sum(needed) + 3, max(needed) + 2
    free = list(rng.permutation(total))
    key = np.full((total, kv_heads, head_dim, BLOCK), np.nan).astype(DTYPES[dtype])
    value = np.full((total, kv_heads, BLOCK, head_dim), np.nan).astype(DTYPES[dtype])
    tables = rng.integers(-(2**31), 2**31, (len(lengths), width)).astype(np.int32)  # past the end: anything
    for s, n in enumerate(lengths):
        for b in range(needed[s]):
            tables[s, b] = block = free.pop()
            part = slice(b * BLOCK, min(n, (b + 1) * BLOCK))
            size = part.stop - part.start
            key[block, :, :, :size] = keys[s][part].transpose(1, 2, 0)
            value[block, :, :size] = values[s][part].transpose(1, 0, 2)
    return Cache(keys, values, key, value, tables)


def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """One row: q [head_dim], k and v [n, head_dim], in their dtype; the sums are taken one after another."""
    scores = np.cumsum(k * q, axis=1, dtype=q.dtype)[:, -1] * q.dtype.type(scale)
    weights = np.exp(scores - scores.max())
    total = np.cumsum(weights, dtype=q.dtype)[-1]
    return np.asarray(np.cumsum(weights[:, None] * v, axis=0, dtype=q.dtype)[-1] / total)


def run(kernel: Kernel, cache: Cache, q: Array, chosen: list[tuple[int, int, int]], width: int, tasks: int) -> Array:
    """Attention for (sequence, first position, count) groups; q holds all their rows, in order."""
    positions = np.concatenate([np.arange(p, p + n) for _, p, n in chosen]).astype(np.int32)
    starts = np.cumsum([0, *[n for _, _, n in chosen]]).astype(np.int32)
    tables = cache.tables[[s for s, _, _ in chosen]]
    out = Guarded((len(positions), width), np.float32)
    dims = [len(positions), len(chosen), tables.shape[1], 3]
    kernel(dims, [q, cache.key, cache.value, positions, starts, tables, out], tasks)
    return out.array


HEADS = [(1, 1), (2, 2), (4, 2), (3, 1), (7, 1), (14, 2), (8, 1)]


@settings(max_examples=12)
@given(
    heads=st.sampled_from(HEADS),
    head_dim=st.sampled_from([8, 10, 12, 20, 64, 80, 100, 128, 256]),
    dtype=st.sampled_from(sorted(DTYPES)),
    lengths=st.lists(st.sampled_from([1, 5, 16, 17, 33, 100]), min_size=1, max_size=3),
    extra=st.booleans(),
    tasks=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
@example(heads=(4, 2), head_dim=32, dtype="f16", lengths=[SEGMENT + 3, 2 * SEGMENT + 40], extra=True, tasks=2, seed=1)
@example(heads=(1, 1), head_dim=20, dtype="f32", lengths=[SEGMENT + 1], extra=False, tasks=3, seed=2)
@example(heads=(7, 1), head_dim=12, dtype="bf16", lengths=[SEGMENT, 17], extra=False, tasks=2, seed=3)
def test_paged_attention(
    heads: tuple[int, int], head_dim: int, dtype: str, lengths: list[int], extra: bool, tasks: int, seed: int
) -> None:
    q_heads, kv_heads = heads
    rng = np.random.default_rng(seed)
    cache = make_cache(rng, lengths, kv_heads, head_dim, dtype)
    width, scale = q_heads * head_dim, 1 / math.sqrt(head_dim)
    stride = width + 2 * kv_heads * head_dim if extra else width
    q = [rng.standard_normal((n, stride)).astype(np.float32) for n in lengths]
    for rows in q:
        rows[:, width:] = np.nan
    kernel = Kernel(
        paged_attention,
        V3,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=scale,
        kv_dtype=dtype,
        **({"query_stride": stride} if extra else {}),
    )
    whole = run(kernel, cache, np.concatenate(q), [(s, 0, n) for s, n in enumerate(lengths)], width, tasks)

    truth, naive = np.empty(whole.shape), np.empty(whole.shape, np.float32)
    row = 0
    for s, n in enumerate(lengths):
        for p in range(n):
            for h in range(q_heads):
                part = slice(h * head_dim, (h + 1) * head_dim)
                k, v = (a[s][: p + 1, h // (q_heads // kv_heads)] for a in (cache.keys, cache.values))
                truth[row, part] = attend(f64(q[s][p, part]), f64(k), f64(v), scale)
                naive[row, part] = attend(q[s][p, part], f32(k), f32(v), scale)
            row += 1
    assert_as_good_as(whole, naive, truth)

    # The same bits, chunk by chunk and in another batch: the last rows of each sequence as a decode step, some before.
    begin = np.cumsum([0, *lengths])
    last = run(
        kernel,
        cache,
        np.stack([a[-1] for a in q[::-1]]),
        [(s, n - 1, 1) for s, n in reversed(list(enumerate(lengths)))],
        width,
        1,
    )
    for s, n in enumerate(lengths):
        assert same_bits(last[len(lengths) - 1 - s], whole[begin[s] + n - 1])
        cut = n // 3
        if cut:
            chunk = run(kernel, cache, q[s][cut:], [(s, cut, n - cut)], width, 2)
            assert same_bits(chunk, whole[begin[s] + cut : begin[s] + n])


def test_later_keys_never_reach_a_row() -> None:
    """Infinity and NaN at the last position of a prefill leave all rows before it as they were."""
    rng = np.random.default_rng(0)
    kernel = Kernel(paged_attention, V3, q_heads=2, kv_heads=2, head_dim=12, scale=0.3, kv_dtype="f32")
    cache = make_cache(rng, [22], 2, 12, "f32")
    q = rng.standard_normal((22, 24)).astype(np.float32)
    clean = run(kernel, cache, q, [(0, 0, 22)], 24, 1)
    block = cache.tables[0, 1]
    cache.key[block, :, :, 5] = np.inf
    cache.value[block, :, 5] = np.nan
    dirty = run(kernel, cache, q, [(0, 0, 22)], 24, 1)
    assert same_bits(dirty[:-1], clean[:-1])
    assert np.isnan(dirty[-1]).all()


def test_large_scores() -> None:
    """A softmax whose exponentials would overflow without the maximum."""
    rng = np.random.default_rng(0)
    cache = make_cache(rng, [40], 1, 8, "f32")
    cache.key *= 100
    q = 100 * rng.standard_normal((1, 8)).astype(np.float32)
    kernel = Kernel(paged_attention, V3, q_heads=1, kv_heads=1, head_dim=8, scale=1.0, kv_dtype="f32")
    out = run(kernel, cache, q, [(0, 39, 1)], 8, 1)
    k, v = 100 * cache.keys[0][:, 0], cache.values[0][:, 0]
    assert_as_good_as(out[0], attend(q[0], k, v, 1.0), attend(f64(q[0]), f64(k), f64(v), 1.0))


def rotated(x: Array, cos: Array, sin: Array, rot_dim: int, layout: str) -> Array:
    """x [tokens, heads, head_dim] in its dtype."""
    y = x.copy()
    c, s = cos[:, None], sin[:, None]
    half = rot_dim // 2
    first, second = (
        (slice(0, half), slice(half, rot_dim)) if layout == "half" else (slice(0, rot_dim, 2), slice(1, rot_dim, 2))
    )
    y[..., first] = x[..., first] * c - x[..., second] * s
    y[..., second] = x[..., second] * c + x[..., first] * s
    return y


@settings(max_examples=12)
@given(
    heads=st.sampled_from(HEADS),
    head_dim=st.integers(2, 50).map(lambda h: 2 * h),
    part=st.sampled_from([0.0, 0.4, 1.0]),
    layout=st.sampled_from(["half", "interleaved"]),
    dtype=st.sampled_from(sorted(DTYPES)),
    tokens=st.integers(1, 20),
    tasks=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_append(
    heads: tuple[int, int], head_dim: int, part: float, layout: str, dtype: str, tokens: int, tasks: int, seed: int
) -> None:
    """`part` of each head is rotated; none: `append`."""
    q_heads, kv_heads = heads
    rot_dim = int(head_dim * part) // 2 * 2
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((tokens, q_heads + 2 * kv_heads, head_dim)).astype(np.float32)
    angle = rng.uniform(0, 6, (tokens, rot_dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    blocks = -(-tokens // BLOCK) + 2
    slots = rng.permutation(blocks * BLOCK)[:tokens].astype(np.int32)
    slots[rng.random(tokens) < 0.2] = -1
    key = Guarded((blocks, kv_heads, head_dim, BLOCK), DTYPES[dtype])
    value = Guarded((blocks, kv_heads, BLOCK, head_dim), DTYPES[dtype])
    untouched = same = key.array.tobytes(), value.array.tobytes()
    sizes: dict[str, Any] = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim, "kv_dtype": dtype}
    if rot_dim:
        q = Guarded((tokens, q_heads, head_dim), np.float32)
        kernel = Kernel(rope_append, V3, rot_dim=rot_dim, layout=layout, **sizes)
        kernel([tokens], [qkv, cos, sin, slots, key, value, q], tasks)
    else:
        Kernel(append, V3, **sizes)([tokens], [qkv, slots, key, value], tasks)

    turned = rotated(qkv, cos, sin, rot_dim, layout)
    truth = rotated(f64(qkv), f64(cos), f64(sin), rot_dim, layout)
    if rot_dim:
        assert_as_good_as(q.array, turned[:, :q_heads], truth[:, :q_heads], "q")
    written = slots >= 0
    block, offset = slots[written] // BLOCK, slots[written] % BLOCK
    k = key.array[block, :, :, offset]
    v = value.array[block, :, offset]
    both = slice(q_heads, q_heads + kv_heads)
    if written.any():
        assert_as_good_as(f32(k), f32(stored(turned[written][:, both], dtype)), truth[written][:, both], "key")
    assert same_bits(
        np.ascontiguousarray(v), np.ascontiguousarray(stored(qkv[written][:, q_heads + kv_heads :], dtype))
    )
    # What no slot names is as it was.
    key.array[block, :, :, offset] = np.frombuffer(same[0], DTYPES[dtype])[0]
    value.array[block, :, offset] = np.frombuffer(same[1], DTYPES[dtype])[0]
    assert (key.array.tobytes(), value.array.tobytes()) == untouched


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_append_rounds_to_nearest_even_and_keeps_special_values(dtype: str) -> None:
    special = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-40, 6e-8, 1.00390625, 1.01171875, 1.00048828125, 1e30],
        np.float32,
    )
    qkv = np.concatenate([np.zeros(12, np.float32), special, special])[None]
    key, value = Guarded((1, 1, 12, BLOCK), DTYPES[dtype]), Guarded((1, 1, BLOCK, 12), DTYPES[dtype])
    Kernel(append, V3, q_heads=1, kv_heads=1, head_dim=12, kv_dtype=dtype)(
        [1], [qkv, np.zeros(1, np.int32), key, value]
    )
    with np.errstate(over="ignore"):
        expected = stored(special, dtype)
    for got in (key.array[0, 0, :, 0], value.array[0, 0, 0]):
        assert np.array_equal(f32(got), f32(expected), equal_nan=True)
        assert (np.signbit(f32(got)) == np.signbit(f32(expected)))[~np.isnan(special)].all()
