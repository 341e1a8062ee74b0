"""A table of examples, at least one for each op: types, operands, and what it computes, written once more in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from llmc.ir.op import Array, ConstantData, Op
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
from llmc.ir.ops.norm import AddLayerNorm, AddRmsNorm, LayerNorm, RmsNorm
from llmc.ir.ops.quantized import (
    DequantizeRows,
    DequantizeWeight,
    QuantizedEmbedding,
    QuantizedGatedLinear,
    QuantizedLinear,
    QuantizeRows,
    QuantizeWeight,
)
from llmc.ir.ops.reduce import Argmax, Mean, Softmax, Sum
from llmc.ir.ops.rope import DynamicFrequencies, Rope, RotaryTable
from llmc.ir.ops.shape import Concat, Constant, Expand, GatherRows, Reshape, Slice, Transpose
from llmc.ir.types import DType, TensorType, symbol

T = symbol("t")
SIZE = 5
"""What the symbol t is in these tests."""
erf = np.vectorize(math.erf)


@dataclass(frozen=True)
class Example:
    """An op, its operands' types, what it computes written once more in numpy, and operands where random ones will not
    do."""

    op: Op
    types: tuple[TensorType, ...]
    expected: Callable[..., Any]
    given: dict[int, Array] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.op.name + "-" + "-".join(map(str, self.types))


def f(*shape: Any) -> TensorType:
    return TensorType(DType.F32, shape)


def i(*shape: Any) -> TensorType:
    return TensorType(DType.I32, shape)


def silu(x: Array) -> Any:
    return x / (1 + np.exp(-x))


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


def attend(q: Array, k: Array, v: Array, positions: Array) -> Array:
    """4 heads of width 3 over 2 key heads, token by token."""
    out = np.zeros_like(q)
    for t, head in np.ndindex(len(q), 4):
        mine, theirs = slice(3 * head, 3 * head + 3), slice(3 * (head // 2), 3 * (head // 2) + 3)
        seen = positions <= positions[t]
        weights = np.exp(k[seen][:, theirs] @ q[t, mine] * 0.5)
        out[t, mine] = weights @ v[seen][:, theirs] / weights.sum()
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
) -> Array:
    """Two sequences, 3 and 2 tokens, 2 heads of width 2 over one key head."""
    out = np.zeros_like(q)
    for t in range(len(q)):
        blocks = tables[int(t >= starts[1])]
        keys = np.concatenate([key[b, 0].T for b in blocks])[: positions[t] + 1]
        values = np.concatenate([value[b, 0] for b in blocks])[: positions[t] + 1]
        for head in range(2):
            scores = (keys @ q[t, 2 * head : 2 * head + 2] * 0.5)[-window:]
            weights = np.exp(cap * np.tanh(scores / cap) if cap else scores)
            total = weights.sum() + (0 if sinks is None else np.exp(sinks[head]))
            out[t, 2 * head : 2 * head + 2] = weights @ values[-window:] / total
    return out


def dynamic(p: Array) -> Array:
    base = 100.0 * np.where(p + 1 > 3, 2.0 * (p + 1) / 3 - 1, 1.0) ** (6 / 4)
    return base[:, None] ** (-np.arange(0, 6, 2) / 6)


def weight_types(n: int, groups: int, group: int = 32) -> tuple[TensorType, TensorType]:
    """Codes and scales of n rows."""
    return TensorType(DType.U8, (n, group * groups)), TensorType(DType.F16, (n, groups))


def dequantized(codes: Array, scales: Array, zero: int, width: int, group: int = 32) -> Array:
    """Weights, one by one."""
    out = np.zeros((len(codes), width))
    for row, column in np.ndindex(out.shape):
        out[row, column] = (int(codes[row, column]) - zero) * scales[row, column // group]
    return out


def dequantized_floats(codes: Array, scales: Array, width: int) -> Array:
    """The same of 8-bit floats: 1 bit of sign, 4 of exponent about 7, 3 of mantissa."""
    out = np.zeros((len(codes), width))
    for row, column in np.ndindex(out.shape):
        exponent, mantissa = int(codes[row, column]) // 8 % 16, int(codes[row, column]) % 8
        size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
        out[row, column] = (-size if codes[row, column] >= 128 else size) * scales[row, column // 128]
    return out


def rounded(x: Array) -> tuple[Array, Array]:
    """Codes and scales of activations, group by group, every step in float32."""
    x = np.pad(x.astype(np.float32), ((0, 0), (0, -x.shape[1] % 32)))
    codes, scales = np.zeros(x.shape), np.zeros((len(x), x.shape[1] // 32))
    for row, group in np.ndindex(scales.shape):
        part = x[row, 32 * group : 32 * group + 32]
        largest = np.float32(max(abs(v) for v in part))
        scales[row, group] = largest * np.float32(1 / 127)
        inverse = np.float32(0) if largest < 1e-30 else np.float32(127) / largest
        codes[row, 32 * group : 32 * group + 32] = [round(float(v * inverse)) for v in part]
    return codes, scales


def fake(x: Array) -> Array:
    """Activations as their codes say."""
    codes, scales = rounded(x)
    back: Array = (codes * np.repeat(scales, 32, 1))[:, : x.shape[1]]
    return back


EIGHT_BITS = np.array([np.arange(32) * 8 - 127, np.zeros(32)])
CODES = np.random.default_rng(3).integers(0, 16, (4, 64))
FLOAT_CODES = np.random.default_rng(4).permutation(2 * 256).reshape(2, 256) % 256 // 128 * 128 + np.arange(256) % 127
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
    Example(
        QuantizeWeight("q4"),
        (f(2, 32),),
        lambda w: (np.array([np.arange(32) % 16, np.full(32, 8)]), np.array([[0.5], [0]])),
        {0: np.array([np.arange(32) % 16 - 8.0, np.zeros(32)]) / 2},
    ),
    Example(
        QuantizeWeight("q8"),
        (f(2, 32),),
        lambda w: (128 + EIGHT_BITS, np.array([[0.5], [0]])),
        {0: EIGHT_BITS / 2},
    ),
    Example(DequantizeWeight("q8", 33), weight_types(4, 2), lambda c, s: dequantized(c, s, 128, 33)),
    Example(DequantizeWeight("q4", 64), weight_types(4, 2), lambda c, s: dequantized(c, s, 8, 64), {0: CODES}),
    Example(
        DequantizeWeight("q4g64", 100),
        weight_types(2, 2, 64),
        lambda c, s: dequantized(c, s, 8, 100, 64),
        {0: CODES.reshape(2, 128)},
    ),
    Example(
        DequantizeWeight("fp8", 200),
        weight_types(2, 2, 128),
        lambda c, s: dequantized_floats(c, s, 200),
        {0: FLOAT_CODES},
    ),
    Example(
        QuantizedEmbedding("fp8", 256),
        (i(T), *weight_types(2, 2, 128)),
        lambda ids, c, s: dequantized_floats(c, s, 256)[ids],
        {1: FLOAT_CODES},
    ),
    Example(QuantizeRows(), (f(T, 64),), rounded),
    Example(QuantizeRows(), (f(T, 40),), rounded),
    Example(
        QuantizeRows(2),
        (f(2, 4),),
        lambda x: (
            np.array([[127, -64, 0, 0], [0, 0, 2, 127]]),
            np.array([[2, 0], [1e-31, 254]]).astype(np.float32) * np.float32(1 / 127),
        ),
        {0: np.array([[2.0, -1, 0, 0], [1e-31, 0, 5, 254]])},
    ),
    Example(
        DequantizeRows(33),
        (TensorType(DType.I8, (T, 64)), f(T, 2)),
        lambda c, s: (c * np.repeat(s, 32, 1))[:, :33],
    ),
    Example(
        QuantizedLinear("q8"),
        (f(T, 33), *weight_types(4, 2)),
        lambda x, c, s: fake(x) @ dequantized(c, s, 128, 33).T,
    ),
    Example(
        QuantizedLinear("q4", True, "relu", True),
        (f(T, 64), *weight_types(4, 2), f(4), f(T, 4)),
        lambda x, c, s, b, r: np.maximum(fake(x) @ dequantized(c, s, 8, 64).T + b, 0) + r,
        {1: CODES},
    ),
    Example(
        QuantizedGatedLinear("q4", "silu"),
        (f(T, 64), *weight_types(4, 2)),
        lambda x, c, s: silu(fake(x) @ dequantized(c, s, 8, 64)[:2].T) * (fake(x) @ dequantized(c, s, 8, 64)[2:].T),
        {1: CODES},
    ),
    Example(
        QuantizedGatedLinear("q8", "relu", True),
        (f(T, 32), *weight_types(2, 1), f(2)),
        lambda x, c, s, b: np.prod(
            [
                np.maximum(fake(x) @ dequantized(c, s, 128, 32)[:1].T + b[:1], 0),
                fake(x) @ dequantized(c, s, 128, 32)[1:].T + b[1:],
            ],
            axis=0,
        ),
    ),
    Example(
        QuantizedEmbedding("q4", 50),
        (i(T), *weight_types(7, 2)),
        lambda ids, c, s: dequantized(c, s, 8, 50)[ids],
    ),
    Example(RmsNorm(0.1), (f(T, 4), f(4)), rms),
    Example(LayerNorm(0.1), (f(2, T, 4), f(4), f(4)), layer_norm),
    Example(AddRmsNorm(0.1), (f(T, 4), f(T, 4), f(4)), lambda x, r, w: (x + r, rms(x + r, w))),
    Example(AddLayerNorm(0.1), (f(T, 4), f(T, 4), f(4), f(4)), lambda x, r, w, b: (x + r, layer_norm(x + r, w, b))),
    Example(Mean(), (f(T, 4),), lambda x: x.mean(-1, keepdims=True)),
    Example(Sum(), (f(T, 4),), lambda x: x.sum(-1, keepdims=True)),
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
