"""A table of examples, at least one for each op: types, operands, and what it computes, written once more in numpy."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from llmc.ir.op import Array, ConstantData
from llmc.ir.ops.attention import Attention, PagedAttention
from llmc.ir.ops.cache import KvAppend, QkvAppend, RopeAppend
from llmc.ir.ops.elementwise import (
    Add,
    AddScalar,
    Cast,
    Cos,
    Div,
    Erf,
    Exp,
    GeluErf,
    GeluTanh,
    GreaterEqual,
    LogicalAnd,
    Mask,
    Mul,
    MulScalar,
    Neg,
    PowScalar,
    Relu,
    Rsqrt,
    Sigmoid,
    Silu,
    Sin,
    Sub,
    Tanh,
)
from llmc.ir.ops.embedding import Embedding
from llmc.ir.ops.linear import GatedLinear, Linear, Matmul
from llmc.ir.ops.norm import AddLayerNorm, AddRmsNorm, LayerNorm, NormHeads, RmsNorm
from llmc.ir.ops.reduce import Argmax, Mean, SinkSoftmax, Softmax, Sum
from llmc.ir.ops.rope import DynamicFrequencies, Rope, RotaryTable
from llmc.ir.ops.shape import Concat, Constant, Expand, GatherRows, Reshape, Slice, Transpose
from llmc.ir.types import DType, TensorType
from tests.ir.example import SIZE, Example, T, f, i, silu
from tests.ir.quantized_examples import QUANTIZED

erf = np.vectorize(math.erf)


def rms(x: Array, w: Array) -> Any:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 0.1) * w


def layer_norm(x: Array, w: Array, b: Array) -> Any:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * w + b


def rotate(x: Array, cos: Array, sin: Array, heads: int, layout: str) -> Array:
    """Rotation as multiplication of complex numbers."""
    y = x.reshape(len(x), heads, -1).copy()
    part = 2 * cos.shape[1]
    pairs = y[..., :part].reshape(len(x), heads, 2, -1).swapaxes(2, 3) if layout == "half" else y[..., :part]
    turned = (pairs.reshape(len(x), heads, -1, 2) @ [1, 1j]) * (cos + 1j * sin)[:, None]
    both = np.stack([turned.real, turned.imag], -1)
    y[..., :part] = (both.swapaxes(2, 3) if layout == "half" else both).reshape(len(x), heads, part)
    return y.reshape(len(x), -1)


def attend(
    q: Array, k: Array, v: Array, positions: Array, *per_head: Array, window: int = 99, cap: float = 0.0, width: int = 3
) -> Array:
    """4 heads of width 3 over 2 key heads with values of a width, token by token; `per_head`: slopes, then sinks."""
    out = np.zeros((len(q), 4 * width))
    slopes, sinks = per_head or (np.zeros(4), np.full(4, -np.inf))
    for t, head in np.ndindex(len(q), 4):
        mine, theirs = slice(3 * head, 3 * head + 3), slice(3 * (head // 2), 3 * (head // 2) + 3)
        away = positions[t] - positions
        seen = (away >= 0) & (away < window)
        scores = k[seen][:, theirs] @ q[t, mine] * 0.5
        scores = cap * np.tanh(scores / cap) if cap else scores
        weights = np.exp(scores - slopes[head] * away[seen])
        values = v[seen][:, width * (head // 2) :][:, :width]
        out[t, width * head : width * head + width] = weights @ values / (weights.sum() + np.exp(sinks[head]))
    return out


SLOTS = np.array([5, 0, -1, 11, 6])


def append(k: Array, v: Array, slots: Array, key: Array, value: Array) -> tuple[Array, ...]:
    """Blocks of 4, one head of width 2."""
    key, value = key.copy(), value.copy()
    for token, slot in enumerate(slots):
        if slot >= 0:
            key[slot // 4, 0, :, slot % 4] = k[token].astype(np.float16)
            value[slot // 4, 0, slot % 4, :] = v[token].astype(np.float16)
    return key, value


def append_codes(k: Array, v: Array, slots: Array, *states: Array) -> tuple[Array, ...]:
    """The same with codes: the largest of a head's two magnitudes is 127, the other in proportion, in float32."""
    key, value, key_scale, value_scale = (s.copy() for s in states)
    for token, slot in enumerate(slots):
        if slot >= 0:
            for row, codes, scales in (
                (k[token], key[:, 0].swapaxes(1, 2), key_scale),
                (v[token], value[:, 0], value_scale),
            ):
                x = row.astype(np.float32)
                step = max(abs(x[0]), abs(x[1])) / np.float32(127)
                codes[slot // 4, slot % 4] = [round(float(y / step)) for y in x]
                scales[slot // 4, 0, slot % 4] = step
    return key, value, key_scale, value_scale


STATES = (TensorType(DType.F16, (3, 1, 2, 4)), TensorType(DType.F16, (3, 1, 4, 2)))
CODED_STATES = (*(replace(t, dtype=DType.I8) for t in STATES), f(3, 1, 4), f(3, 1, 4))
PAGED = (f(3, 1, 2, 4), f(3, 1, 4, 2))
TABLES = np.array([[2, 0], [1, 0]])


def paged(
    q: Array,
    key: Array,
    value: Array,
    positions: Array,
    starts: Array,
    tables: Array,
    sinks: Array | None = None,
    *,
    window: int = 99,
    cap: float = 0.0,
    slopes: tuple[float, float] = (0.0, 0.0),
) -> Array:
    """Two sequences, 3 and 2 tokens, 2 heads of width 2 over one key head."""
    width = value.shape[-1]
    out = np.zeros((len(q), 2 * width))
    for t in range(len(q)):
        blocks = tables[int(t >= starts[1])]
        keys = np.concatenate([key[b, 0].T for b in blocks])[: positions[t] + 1]
        values = np.concatenate([value[b, 0] for b in blocks])[: positions[t] + 1]
        for head in range(2):
            scores = (keys @ q[t, 2 * head : 2 * head + 2] * 0.5)[-window:]
            scores = cap * np.tanh(scores / cap) if cap else scores
            weights = np.exp(scores - slopes[head] * np.arange(len(scores))[::-1])
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
            out[t, width * head : width * head + width] = weights @ values[-window:] / total
    return out


def dynamic(p: Array) -> Array:
    base = 100.0 * np.where(p + 1 > 3, 2.0 * (p + 1) / 3 - 1, 1.0) ** (6 / 4)
    return base[:, None] ** (-np.arange(0, 6, 2) / 6)


POSITIONS = {3: np.arange(SIZE)}
TABLE = np.arange(12.0).reshape(4, 3).astype(np.float32)

EXAMPLES = [
    Example(Add(), (f(T, 4), f(4)), lambda x, y: x + y),
    Example(Add(), (f(T, 1), f(1, T)), lambda x, y: x + y),
    Example(Sub(), (f(T, 4), f(T, 1)), lambda x, y: x - y),
    Example(Mul(), (f(4), f(T, 4)), lambda x, y: x * y),
    Example(Div(), (f(T, 4), f()), lambda x, y: x / y),
    Example(AddScalar(0.5), (f(T, 4),), lambda x: x + 0.5),
    Example(MulScalar(-2.0), (f(T, 4),), lambda x: x * -2),
    Example(PowScalar(3.0), (f(T, 4),), lambda x: x * x * x),
    Example(Neg(), (f(T),), lambda x: -x),
    Example(Exp(), (f(T),), np.exp),
    Example(Rsqrt(), (f(3),), lambda x: x**-0.5, {0: np.array([0.5, 1.0, 4.0])}),
    Example(Tanh(), (f(T),), np.tanh),
    Example(Sigmoid(), (f(4),), lambda x: np.exp(x) / (1 + np.exp(x)), {0: np.array([-30.0, -1, 0, 20])}),
    Example(Erf(), (f(T),), erf),
    Example(Relu(), (f(T, 3),), lambda x: np.where(x > 0, x, 0)),
    Example(Cos(), (f(T),), np.cos),
    Example(Sin(), (f(T),), np.sin),
    Example(GreaterEqual(), (i(T, 1), i(1, T)), lambda x, y: x >= y),
    Example(LogicalAnd(), (TensorType(DType.BOOL, (3,)),) * 2, lambda x, y: x & y, {0: np.array([True, True, False])}),
    Example(Mask(-math.inf), (f(2, 3), TensorType(DType.BOOL, (3,))), lambda x, m: np.where(m, x, -np.inf)),
    Example(Cast(DType.F16), (f(T, 3),), lambda x: x.astype(np.float16).astype(np.float64)),
    Example(
        Cast(DType.F8E4M3),
        (f(9),),
        lambda x: np.array([448.0, -448.0, 448.0, 1.0, 1.25, -1.25, 2.0**-9, 0.0, np.nan]),
        {0: np.array([460.0, -1e9, np.inf, 1.0625, 1.1876, -1.3124, 2.0**-9, 2.0**-10, np.nan])},
    ),
    Example(Cast(DType.I32), (f(T),), np.trunc),
    Example(Silu(), (f(T, 4),), silu),
    Example(
        GeluTanh(), (f(T, 4),), lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    ),
    Example(GeluErf(), (f(T, 4),), lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2)))),
    Example(Embedding(DType.F32), (i(T), f(7, 3)), lambda ids, table: table[ids]),
    Example(Matmul(), (f(T, 3), f(3, 4)), lambda x, y: np.einsum("ij,jk->ik", x, y)),
    Example(Matmul(), (f(2, 1, T, 3), f(4, 3, T)), lambda x, y: np.einsum("abij,cjk->acik", x, y)),
    Example(Linear(), (f(T, 3), f(4, 3)), lambda x, w: x @ w.T),
    Example(Linear(True, "relu"), (f(T, 3), f(4, 3), f(4)), lambda x, w, b: np.maximum(x @ w.T + b, 0)),
    Example(
        Linear(True, "relu", True),
        (f(T, 3), f(4, 3), f(4), f(T, 4)),
        lambda x, w, b, r: np.maximum(x @ w.T + b, 0) + r,
    ),
    Example(Linear(residual=True), (f(T, 3), f(4, 3), f(T, 4)), lambda x, w, r: r + x @ w.T),
    Example(GatedLinear("silu"), (f(T, 3), f(8, 3)), lambda x, w: silu(x @ w[:4].T) * (x @ w[4:].T)),
    Example(
        GatedLinear("silu", True),
        (f(T, 3), f(4, 3), f(4)),
        lambda x, w, b: silu(x @ w[:2].T + b[:2]) * (x @ w[2:].T + b[2:]),
    ),
    *QUANTIZED,
    Example(RmsNorm(0.1), (f(T, 4), f(4)), rms),
    Example(LayerNorm(0.1), (f(2, T, 4), f(4), f(4)), layer_norm),
    Example(AddRmsNorm(0.1), (f(T, 4), f(T, 4), f(4)), lambda x, r, w: (x + r, rms(x + r, w))),
    Example(AddLayerNorm(0.1), (f(T, 4), f(T, 4), f(4), f(4)), lambda x, r, w, b: (x + r, layer_norm(x + r, w, b))),
    Example(
        NormHeads(0.1, 2, 2, 1, 3),
        (f(T, 9), f(2), f(3)),
        lambda x, q, k: np.hstack([rms(x[:, :2], q), rms(x[:, 2:4], q), rms(x[:, 4:7], k), x[:, 7:]]),
    ),
    Example(
        NormHeads(0.1, 1, 2, 1, 3, centred=True),
        (f(T, 6), f(2), f(3), f(2), f(3)),
        lambda x, q, k, p, m: np.hstack([layer_norm(x[:, :2], q, p), layer_norm(x[:, 2:5], k, m), x[:, 5:]]),
    ),
    Example(Mean(), (f(T, 4),), lambda x: x.mean(-1, keepdims=True)),
    Example(Sum(), (f(T, 4),), lambda x: x.sum(-1, keepdims=True)),
    Example(
        SinkSoftmax(),
        (f(2, T, 4), f(2, 1, 1)),
        lambda x, sink: np.exp(x) / (np.exp(x).sum(-1, keepdims=True) + np.exp(sink)),
    ),
    Example(AddScalar(2.0), (i(T),), lambda x: x + 2),
    Example(Softmax(), (f(T, 4),), lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)),
    Example(
        Softmax(),
        (f(2, 2),),
        lambda x: np.array([[1.0, 0.0], [0.0, 0.0]]),
        {0: np.array([[3.0, -np.inf], [-np.inf, -np.inf]])},
    ),
    Example(Argmax(), (f(2, 3),), lambda x: np.array([1, 0]), {0: np.array([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]])}),
    Example(DynamicFrequencies(100.0, 2.0, 3, 6), (f(T),), dynamic, {0: np.arange(SIZE)}),
    Example(
        RotaryTable(0.5),
        (i(T), f(3)),
        lambda p, w: (np.cos(np.outer(p, w)) / 2, np.sin(np.outer(p, w)) / 2),
    ),
    Example(RotaryTable(1.0), (i(T), f(T, 3)), lambda p, w: (np.cos(p[:, None] * w), np.sin(p[:, None] * w))),
    Example(Rope(2, 6, 6), (f(T, 12), f(T, 3), f(T, 3)), lambda x, c, s: rotate(x, c, s, 2, "half")),
    Example(Rope(2, 6, 4), (f(T, 12), f(T, 2), f(T, 2)), lambda x, c, s: rotate(x, c, s, 2, "half")),
    Example(Rope(2, 4, 4, "interleaved"), (f(T, 8), f(T, 2), f(T, 2)), lambda x, c, s: rotate(x, c, s, 2, "inter")),
    Example(Rope(1, 6, 4, "interleaved"), (f(T, 6), f(T, 2), f(T, 2)), lambda x, c, s: rotate(x, c, s, 1, "inter")),
    Example(Attention(4, 2, 3, 0.5), (f(T, 12), f(T, 6), f(T, 6), i(T)), attend, POSITIONS),
    Example(
        Attention(4, 2, 3, 0.5, window=2, soft_cap=0.75, alibi=True, sinks=True, value_dim=2),
        (f(T, 12), f(T, 6), f(T, 4), i(T), f(4), f(4)),
        partial(attend, window=2, cap=0.75, width=2),
        POSITIONS,
    ),
    Example(
        PagedAttention(2, 1, 2, 0.5),
        (f(5, 4), *PAGED, i(5), i(3), i(2, 2)),
        paged,
        {3: np.array([3, 4, 5, 0, 1]), 4: np.array([0, 3, 5]), 5: TABLES},
    ),
    Example(
        PagedAttention(2, 1, 2, 0.5, window=3, soft_cap=0.75, sinks=True),
        (f(5, 4), *PAGED, i(5), i(3), i(2, 2), f(2)),
        partial(paged, window=3, cap=0.75),
        {3: np.array([3, 4, 5, 0, 1]), 4: np.array([0, 3, 5]), 5: TABLES},
    ),
    Example(
        PagedAttention(2, 1, 2, 0.5, alibi=True, value_dim=3),
        (f(5, 4), f(3, 1, 2, 4), f(3, 1, 4, 3), i(5), i(3), i(2, 2), f(2)),
        lambda *given: paged(*given[:-1], slopes=(0.5, 0.25)),
        {3: np.array([3, 4, 5, 0, 1]), 4: np.array([0, 3, 5]), 5: TABLES, 6: np.array([0.5, 0.25])},
    ),
    Example(
        KvAppend(1, 2, value_dim=3),
        (f(T, 2), f(T, 3), i(T), STATES[0], replace(STATES[1], shape=(3, 1, 4, 3))),
        append,
        {2: SLOTS},
    ),
    Example(KvAppend(1, 2), (f(T, 2), f(T, 2), i(T), *STATES), append, {2: SLOTS}),
    Example(KvAppend(1, 2, scaled=True), (f(T, 2), f(T, 2), i(T), *CODED_STATES), append_codes, {2: SLOTS}),
    Example(
        PagedAttention(2, 1, 2, 0.5, scaled=True),
        (f(5, 4), *CODED_STATES, i(5), i(3), i(2, 2)),
        lambda q, key, value, ks, vs, *rest: paged(q, key * ks[:, :, None], value * vs[..., None], *rest),
        {5: np.array([3, 4, 5, 0, 1]), 6: np.array([0, 3, 5]), 7: TABLES},
    ),
    Example(
        QkvAppend(2, 1, 2, scaled=True),
        (f(T, 8), i(T), *CODED_STATES),
        lambda x, slots, *states: (x[:, :4], *append_codes(x[:, 4:6], x[:, 6:], slots, *states)),
        {1: SLOTS},
    ),
    Example(
        QkvAppend(2, 1, 2),
        (f(T, 8), i(T), *STATES),
        lambda x, slots, key, value: (x[:, :4], *append(x[:, 4:6], x[:, 6:], slots, key, value)),
        {1: SLOTS},
    ),
    Example(
        QkvAppend(2, 1, 2, value_dim=3),
        (f(T, 9), i(T), STATES[0], replace(STATES[1], shape=(3, 1, 4, 3))),
        lambda x, slots, key, value: (x[:, :4], *append(x[:, 4:6], x[:, 6:], slots, key, value)),
        {1: SLOTS},
    ),
    Example(
        RopeAppend(2, 1, 2, 2, value_dim=3),
        (f(T, 9), f(T, 1), f(T, 1), i(T), STATES[0], replace(STATES[1], shape=(3, 1, 4, 3))),
        lambda x, c, s, slots, key, value: (
            rotate(x[:, :4], c, s, 2, "half"),
            *append(rotate(x[:, 4:6], c, s, 1, "half"), x[:, 6:], slots, key, value),
        ),
        {3: SLOTS},
    ),
    Example(
        RopeAppend(2, 1, 2, 2),
        (f(T, 8), f(T, 1), f(T, 1), i(T), *STATES),
        lambda x, c, s, slots, key, value: (
            rotate(x[:, :4], c, s, 2, "half"),
            *append(rotate(x[:, 4:6], c, s, 1, "half"), x[:, 6:], slots, key, value),
        ),
        {3: SLOTS},
    ),
    Example(Constant(DType.F32, ConstantData(TABLE)), (), lambda: TABLE),
    Example(Reshape((T, 2, 3)), (f(T, 6),), lambda x: x.reshape(SIZE, 2, 3)),
    Example(Reshape((2 * T, 3)), (f(T, 6),), lambda x: x.reshape(2 * SIZE, 3)),
    Example(Transpose((2, 0, 1)), (f(T, 2, 3),), lambda x: np.moveaxis(x, 2, 0)),
    Example(Slice(1, 1, 6, 2), (f(T, 7),), lambda x: x[:, [1, 3, 5]]),
    Example(Concat(1), (f(T, 2), f(T, 3)), lambda x, y: np.hstack([x, y])),
    Example(Concat(0), (f(T, 2), f(3, 2)), lambda x, y: np.vstack([x, y])),
    Example(Expand((4, T, 3)), (f(T, 1),), lambda x: np.tile(x, (4, 1, 3))),
    Example(GatherRows(), (f(T, 3), i(4)), lambda x, rows: x[rows], {1: np.array([4, 0, 0, 2])}),
]
