"""Rotation and append: queries, keys, values and scales as the IR says, slots of padding left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.kernels.rope_append import append_spec, grid
from llmc.ir.op import Array
from llmc.ir.ops.cache import quantize_rows
from tests.backends.triton.interpreter import TARGET, run
from tests.backends.triton.paged_batch import NUMPY, poisoned, rounded, tensor
from tests.tolerance import ROUNDING, assert_as_good_as

TOKENS, BLOCKS = 5, 7
EPS = 1e-5
SLOTS = np.array([0, 33, -1, 111, 17], np.int32)


def rotated(x: Array, cos: Array, sin: Array, rotary_dim: int, layout: str) -> Array:
    """x [tokens, heads, head_dim] in float64, or in float32 where all of them are."""
    y = x.copy() if x.dtype == np.float32 else x.astype(np.float64)
    half = rotary_dim // 2
    first, second = (
        (slice(0, half), slice(half, rotary_dim))
        if layout == "half"
        else (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
    )
    a, b, c, s = y[..., first].copy(), y[..., second].copy(), cos[:, None], sin[:, None]
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y


class Norm:
    """Random weights, and biases of a layer norm, of each head's elements or of all heads'."""

    def __init__(self, kind: str, whole: bool, heads: int, kv_heads: int, head_dim: int) -> None:
        self.kind, self.whole = kind, whole
        random = np.random.default_rng(7)
        widths = (
            {"query": heads * head_dim, "key": kv_heads * head_dim} if whole else {"query": head_dim, "key": head_dim}
        )
        names = ["weight", *(["bias"] if kind == "layer" else [])]
        self.vectors = {
            f"{of}_{name}": random.standard_normal(width).astype(np.float32)
            for name in names
            for of, width in widths.items()
        }

    def __call__(self, x: Array, of: str) -> Array:
        """x [tokens, heads, head_dim] normalised, in x's dtype."""
        pieces = x.reshape(len(x), 1, -1) if self.whole else x
        if self.kind == "layer":
            pieces = pieces - pieces.mean(-1, keepdims=True)
        scale = 1 / np.sqrt((pieces * pieces).mean(-1, keepdims=True) + x.dtype.type(EPS))
        result = pieces * scale * self.vectors[f"{of}_weight"].astype(x.dtype)
        if self.kind == "layer":
            result = result + self.vectors[f"{of}_bias"].astype(x.dtype)
        return np.asarray(result.reshape(x.shape))


def append(
    qkv: Array,
    heads: int,
    kv_heads: int,
    rotary_dim: int,
    layout: str,
    dtypes: tuple[str, str, str],
    size: int = 16,
    norm: Norm | None = None,
) -> tuple[Array, list[Array], Array, Array]:
    """q, the states, cos and sin. qkv [TOKENS, heads + 2 kv_heads, head_dim]."""
    head_dim = qkv.shape[2]
    given, dtype, state = dtypes
    angles = np.random.default_rng(0).uniform(0, 6, (TOKENS, rotary_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    shapes = [(BLOCKS, kv_heads, head_dim, size), (BLOCKS, kv_heads, size, head_dim)]
    if state == "i8":
        states = [torch.full(s, -77, dtype=torch.int8) for s in shapes]
        states += [poisoned((BLOCKS, kv_heads, size), "f32") for _ in range(2)]
    else:
        states = [poisoned(s, state) for s in shapes]
    q = poisoned((TOKENS + 1, heads * head_dim), dtype)
    padded = np.concatenate([qkv.reshape(TOKENS, -1), np.full((1, qkv[0].size), 1e4, np.float32)])
    tensors: dict[str, Any] = {"qkv_ptr": tensor(padded, given)}
    normed: dict[str, Any] = {}
    if norm is not None:
        tensors |= {f"{name}_ptr": torch.from_numpy(vector) for name, vector in norm.vectors.items()}
        normed = {"norm": norm.kind, "norm_eps": EPS, "whole": norm.whole}
    if rotary_dim:
        tensors |= {"cos_ptr": torch.from_numpy(cos), "sin_ptr": torch.from_numpy(sin)}
    tensors["slots_ptr"] = torch.from_numpy(np.append(SLOTS, 3).astype(np.int32))
    names = ("key_ptr", "value_ptr", "key_scale_ptr", "value_scale_ptr")
    tensors |= dict(zip(names, states, strict=False))
    tensors |= {"q_ptr": q, "dims_ptr": torch.tensor([TOKENS, 1, 1, 1], dtype=torch.int32)}
    spec = append_spec(heads, kv_heads, head_dim, rotary_dim, layout, given, dtype, state, size, **normed)
    run(source_of(spec, TARGET), grid(spec, TOKENS + 1), tensors)
    assert q[TOKENS:].isnan().all()
    return q[:TOKENS].float().numpy(), [x.float().numpy() for x in states], cos, sin


def assert_near(got: Array, truth: Array, dtype: str) -> None:
    """A float32 result of a few operations, rounded once more: within half a unit in the last place, and a little."""
    unit = {"f32": ROUNDING, "f16": 2.0**-11, "bf16": 2.0**-8, "f8e4m3": 2.0**-4}[dtype]
    least = {"f32": 1e-7, "f16": 2.0**-24, "bf16": 1e-7, "f8e4m3": 2.0**-10}[dtype]
    error = np.abs(got.astype(np.float64) - truth)
    assert (error <= 1.01 * unit * np.abs(truth) + 1.01 * least + 1e-6).all(), error.max()


@pytest.mark.parametrize("state", ["f32", "f16", "bf16", "f8e4m3"])
@pytest.mark.parametrize(("given", "dtype"), [("f32", "bf16"), ("f16", "f16"), ("f32", "f32"), ("bf16", "bf16")])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "layout"),
    [(64, 64, "half"), (80, 32, "half"), (20, 8, "interleaved"), (32, 0, "half")],
)
def test_float_states(head_dim: int, rotary_dim: int, layout: str, given: str, dtype: str, state: str) -> None:
    heads, kv_heads = 4, 2
    qkv = rounded(np.random.default_rng(1).standard_normal((TOKENS, heads + 2 * kv_heads, head_dim)), given)
    qkv[1, -1, 0] = 1000.0  # beyond the largest 8-bit float
    q, (key, value), cos, sin = append(qkv, heads, kv_heads, rotary_dim, layout, (given, dtype, state))
    turned = rotated(qkv[:, : heads + kv_heads], cos, sin, rotary_dim, layout)
    assert_near(q.reshape(TOKENS, heads, head_dim), turned[:, :heads], dtype)
    v = qkv[:, heads + kv_heads :].astype(np.float64)
    if state == "f8e4m3":
        v = np.clip(v, -448, 448)
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            assert_near(key[slot // 16, :, :, slot % 16], turned[token, heads:], state)
            assert_near(value[slot // 16, :, slot % 16], v[token], state)
            key[slot // 16, :, :, slot % 16] = value[slot // 16, :, slot % 16] = np.nan
    assert np.isnan(key).all() and np.isnan(value).all()


@pytest.mark.parametrize("size", [16, 32])
def test_codes_and_scales_are_those_of_the_ir(size: int) -> None:
    """Bit by bit where nothing is rotated; ties, zeros, infinities and NaN among them."""
    heads, kv_heads, head_dim = 3, 1, 32
    qkv = np.random.default_rng(2).standard_normal((TOKENS, heads + 2 * kv_heads, head_dim)).astype(np.float32)
    qkv[0, 3] = np.arange(head_dim) - 15.5
    qkv[0, 3, 0] = 127.0  # a scale of 1: all others are ties
    qkv[1, 3] = 0.0
    qkv[3, 3, 5] = np.inf
    qkv[4, 4, 5] = np.nan
    q, (key, value, key_scale, value_scale), _, _ = append(qkv, heads, kv_heads, 0, "half", ("f32", "f32", "i8"), size)
    assert np.array_equal(q, qkv[:, :heads].reshape(TOKENS, -1))
    for token, slot in enumerate(SLOTS):
        if slot < 0:
            continue
        block, offset = divmod(int(slot), size)
        results = (heads, key[block, 0, :, offset], key_scale), (heads + 1, value[block, 0, offset], value_scale)
        for what, got, scale in results:
            codes, scales = quantize_rows(qkv[token, what : what + 1])
            assert np.array_equal(got, codes[0])
            assert np.array_equal(scale[block, 0, offset], scales[0], equal_nan=True)
        key[block, :, :, offset] = value[block, :, offset] = -77
        key_scale[block, :, offset] = value_scale[block, :, offset] = np.nan
    assert (key == -77).all() and (value == -77).all()
    assert np.isnan(key_scale).all() and np.isnan(value_scale).all()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_rotated_codes(layout: str, dtype: str) -> None:
    """Keys come back within half a code, and as little more as float32 makes."""
    qkv = rounded(np.random.default_rng(3).standard_normal((TOKENS, 4, 64)), dtype)
    q, (key, _, key_scale, _), cos, sin = append(qkv, 2, 1, 48, layout, (dtype, dtype, "i8"))
    turned = rotated(qkv[:, :3], cos, sin, 48, layout)
    assert_near(q.reshape(TOKENS, 2, 64), turned[:, :2], dtype)
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            scale = key_scale[slot // 16, 0, slot % 16]
            error = np.abs(key[slot // 16, 0, :, slot % 16] * scale - turned[token, 2])
            assert error.max() <= 0.501 * scale
            assert np.abs(key[slot // 16, 0, :, slot % 16]).max() == 127


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim", "layout"),
    [(6, 2, 64, 64, "half"), (5, 1, 20, 8, "interleaved"), (3, 3, 80, 32, "half"), (4, 2, 32, 0, "half")],
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_norms(
    heads: int, kv_heads: int, head_dim: int, rotary_dim: int, layout: str, whole: bool, kind: str, dtype: str
) -> None:
    """Queries and keys normalised, each head or all together, then rotated; values as they are."""
    qkv = np.random.default_rng(5).standard_normal((TOKENS, heads + 2 * kv_heads, head_dim)).astype(np.float32) + 0.5
    norm = Norm(kind, whole, heads, kv_heads, head_dim)
    q, (key, value), cos, sin = append(qkv, heads, kv_heads, rotary_dim, layout, ("f32", dtype, dtype), norm=norm)
    owned = [t for t, slot in enumerate(SLOTS) if slot >= 0]
    blocks, offsets = SLOTS[owned] // 16, SLOTS[owned] % 16
    pairs = [(q.reshape(TOKENS, heads, head_dim), "query", qkv[:, :heads])]
    pairs.append((key[blocks, :, :, offsets], "key", qkv[owned, heads : heads + kv_heads]))
    for got, of, x in pairs:
        tables = (cos, sin) if of == "query" else (cos[owned], sin[owned])
        plain = rotated(norm(x, of), *tables, rotary_dim, layout)
        truth = rotated(norm(x.astype(np.float64), of), *tables, rotary_dim, layout)
        assert_as_good_as(got, rounded(plain, dtype), truth, of)
    assert np.array_equal(value[blocks, :, offsets], rounded(qkv[owned, heads + kv_heads :], dtype))
    key[blocks, :, :, offsets] = value[blocks, :, offsets] = np.nan
    assert np.isnan(key).all() and np.isnan(value).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_norm_keeps_what_is_not_a_number_to_itself(whole: bool, kind: str) -> None:
    """To a head, or to all queries, or to all keys, of its token; an infinity makes its piece NaN or 0."""
    heads, kv_heads, head_dim = 3, 2, 32
    qkv = np.ones((TOKENS, heads + 2 * kv_heads, head_dim), np.float32)
    qkv[0, 1, 4], qkv[1, heads, 5] = np.nan, np.inf
    norm = Norm(kind, whole, heads, kv_heads, head_dim)
    q, (key, value), _, _ = append(qkv, heads, kv_heads, head_dim, "half", ("f32", "f32", "f32"), norm=norm)
    bad = np.asarray(np.isnan(q.reshape(TOKENS, heads, head_dim)).any(-1))
    assert bad[0].tolist() == ([True] * 3 if whole else [False, True, False]) and not bad[1:].any()
    written = key[SLOTS[[0, 1]] // 16, :, :, SLOTS[[0, 1]] % 16]
    assert np.isfinite(written[0]).all()
    assert np.isnan(written[1]).any(-1).tolist() == ([True, True] if whole and kind == "layer" else [True, False])
    assert np.isfinite(value[SLOTS[[0, 1]] // 16, :, SLOTS[[0, 1]] % 16]).all()


@pytest.mark.parametrize("whole", [False, True])
def test_norms_before_codes(whole: bool) -> None:
    """Keys come back within half a code of what they are; each head has a scale of its own, however it is normed."""
    qkv = np.random.default_rng(3).standard_normal((TOKENS, 4, 64)).astype(np.float32)
    norm = Norm("rms", whole, 2, 1, 64)
    _, (key, _, key_scale, value_scale), cos, sin = append(qkv, 2, 1, 64, "half", ("f32", "f32", "i8"), norm=norm)
    turned = rotated(norm(qkv[:, 2:3].astype(np.float64), "key"), cos, sin, 64, "half")
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            scale = key_scale[slot // 16, 0, slot % 16]
            assert np.abs(key[slot // 16, 0, :, slot % 16] * scale - turned[token, 0]).max() <= 0.501 * scale
            key_scale[slot // 16, 0, slot % 16] = value_scale[slot // 16, 0, slot % 16] = np.nan
    assert np.isnan(key_scale).all() and np.isnan(value_scale).all()


def test_every_state_dtype_is_known() -> None:
    assert set(NUMPY) == {"f32", "f16", "bf16", "f8e4m3", "i8"}
