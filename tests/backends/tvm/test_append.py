"""Appending to the paged state, over shuffled slots whose neighbours must stay as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.kernels.cache import append
from llmc.ir.ops.cache import quantize_rows
from tests.backends.tvm.machine import DTYPES, V3, Guarded, Kernel, f32, f64, needs_v3, same_bits, stored
from tests.backends.tvm.paged import BLOCK, rotated
from tests.tolerance import assert_as_good_as

pytestmark = needs_v3
HEADS = [(1, 1), (2, 2), (4, 2), (3, 1), (7, 1), (14, 2), (8, 1)]


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
    """`part` of each head is rotated."""
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
    kernel = Kernel(append, V3, rot_dim=rot_dim, layout=layout, **sizes)
    kernel([tokens], [qkv, *([cos, sin] if rot_dim else []), slots, key, value], tasks)

    turned = rotated(qkv, cos, sin, rot_dim, layout)
    truth = rotated(f64(qkv), f64(cos), f64(sin), rot_dim, layout)
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


@settings(max_examples=12)
@given(
    heads=st.sampled_from(HEADS),
    head_dim=st.integers(1, 50),
    tokens=st.integers(1, 20),
    rotated_part=st.booleans(),
    tasks=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_append_of_codes(
    heads: tuple[int, int], head_dim: int, tokens: int, rotated_part: bool, tasks: int, seed: int
) -> None:
    """Codes and scales as the op's reference has them, bit for bit; of rotated keys within half a step of the truth."""
    q_heads, kv_heads = heads
    rot_dim = head_dim // 2 * 2 if rotated_part else 0
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((tokens, q_heads + 2 * kv_heads, head_dim)).astype(np.float32)
    qkv *= 10.0 ** rng.integers(-3, 4, (tokens, q_heads + 2 * kv_heads, 1))
    qkv[rng.random(qkv.shape[:2]) < 0.1] = 0
    angle = rng.uniform(0, 6, (tokens, rot_dim // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    slots = rng.permutation(2 * tokens + BLOCK)[:tokens].astype(np.int32)
    blocks = -(-(2 * tokens + BLOCK) // BLOCK)
    states = [
        Guarded((blocks, kv_heads, head_dim, BLOCK), np.int8),
        Guarded((blocks, kv_heads, BLOCK, head_dim), np.int8),
        *(Guarded((blocks, kv_heads, BLOCK), np.float32) for _ in range(2)),
    ]
    kernel = Kernel(append, V3, q_heads=q_heads, kv_heads=kv_heads, head_dim=head_dim, rot_dim=rot_dim, kv_dtype="i8")
    kernel([tokens], [qkv, *([cos, sin] if rot_dim else []), slots, *states], tasks)
    for state in states:
        state.check()
    key, value, key_scale, value_scale = (s.array for s in states)
    block, offset = slots // BLOCK, slots % BLOCK
    codes, scales = quantize_rows(qkv[:, q_heads + kv_heads :].reshape(-1, head_dim))
    assert same_bits(value[block, :, offset].reshape(-1, head_dim), codes.astype(np.int8))
    assert same_bits(value_scale[block, :, offset].reshape(-1), scales)
    keys = slice(q_heads, q_heads + kv_heads)
    if not rot_dim:
        codes, scales = quantize_rows(qkv[:, keys].reshape(-1, head_dim))
        assert same_bits(key[block, :, :, offset].reshape(-1, head_dim), codes.astype(np.int8))
        assert same_bits(key_scale[block, :, offset].reshape(-1), scales)
    truth = rotated(f64(qkv), f64(cos), f64(sin), rot_dim, "half")[:, keys]
    steps = f64(key_scale[block, :, offset])[:, :, None]
    assert (np.abs(f64(key[block, :, :, offset]) * steps - truth) <= steps * (0.5 + 1e-4)).all()


def test_codes_of_special_values() -> None:
    """A vector with an infinity or a NaN is NaN as a whole; one too small for a scale is zero; codes stay in range."""
    nan, inf = np.nan, np.inf
    rows = np.array(
        [[1, nan], [inf, 2], [-inf, inf], [0, 0], [1e-45, -4e-44], [3e-43, 1e-45], [2e-43, 1e-44]], np.float32
    )
    qkv = np.concatenate([np.zeros_like(rows), rows, rows], axis=1)
    states = [Guarded((1, 1, 2, BLOCK), np.int8), Guarded((1, 1, BLOCK, 2), np.int8)]
    states += [Guarded((1, 1, BLOCK), np.float32) for _ in range(2)]
    Kernel(append, V3, q_heads=1, kv_heads=1, head_dim=2, kv_dtype="i8")(
        [len(rows)], [qkv, np.arange(len(rows), dtype=np.int32), *states]
    )
    key, value, key_scale, value_scale = (s.array for s in states)
    count = len(rows)
    assert same_bits(np.ascontiguousarray(key[0, 0].T), value[0, 0])
    assert same_bits(key_scale, value_scale)
    with np.errstate(invalid="ignore"):
        decoded = f32(value[0, 0, :count]) * value_scale[0, 0, :count, None]
    assert np.isnan(decoded[:2]).any(axis=1).all() and np.isnan(decoded[2]).all()
    assert (decoded[3:5] == 0).all()
    assert (np.abs(value[0, 0, :count].astype(int)) <= 127).all()
    assert same_bits(value_scale[0, 0, 3:count], quantize_rows(rows[3:])[1])
    assert same_bits(value[0, 0, 3:count], quantize_rows(rows[3:])[0].astype(np.int8))
