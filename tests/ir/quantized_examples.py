"""Examples of the ops on codes and scales."""

from __future__ import annotations

import numpy as np

from llmc.ir.op import Array
from llmc.ir.ops.quantized import (
    DequantizeRows,
    DequantizeWeight,
    QuantizedEmbedding,
    QuantizedGatedLinear,
    QuantizedLinear,
    QuantizeRows,
    QuantizeWeight,
)
from llmc.ir.types import DType, TensorType
from tests.ir.example import Example, T, f, i, silu


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

QUANTIZED = [
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
]
