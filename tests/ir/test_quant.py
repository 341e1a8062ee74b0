"""Weight formats: what a round trip loses, how codes are stored, what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmc.ir.builder import Builder
from llmc.ir.errors import LlmcError
from llmc.ir.interpret import evaluate_parameters
from llmc.ir.op import Array
from llmc.ir.quant import FORMATS, INTEGER_FORMATS, format_named
from llmc.ir.quant.format import BLOCK, QuantFormat
from llmc.ir.types import DType

each = pytest.mark.parametrize("quant", FORMATS.values(), ids=lambda f: f.name)
LOW = {"q8": 1, "q8g128": 1, "q4": 0, "q4g64": 0, "q4g128": 0, "fp8": 0}
HIGH = {"q8": 255, "q8g128": 255, "q4": 15, "q4g64": 15, "q4g128": 15, "fp8": 0xFE}
NEVER = {"fp8": (0x7F, 0x80)}
"""Codes that are not made: NaN, and a second zero."""


def value_of(code: int, quant: QuantFormat) -> float:
    """What a code says, by hand: an integer about zero, or 1 bit of sign, 4 of exponent about 7, 3 of mantissa."""
    if quant.name != "fp8":
        return code - {8: 128.0, 4: 8.0}[quant.bits]
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return np.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


VALUES = {quant.name: np.array([value_of(c, quant) for c in range(256)]) for quant in FORMATS.values()}


def groups(array: Array, quant: QuantFormat) -> Array:
    """[n, k] -> [n, groups, group], the last group filled up with zeros."""
    array = np.pad(array, ((0, 0), (0, quant.padded(array.shape[1]) - array.shape[1])))
    return array.reshape(len(array), array.shape[1] // quant.group, quant.group)


def check_round_trip(weights: Array, quant: QuantFormat) -> Array:
    """Shapes, codes in range, every error within the bound of its group; gives what comes back."""
    rows, width = weights.shape
    codes, scales = quant.quantize(weights)
    padded = quant.padded(width)
    assert codes.dtype == np.uint8
    assert codes.shape == (rows, padded)
    assert scales.dtype == np.float16
    assert scales.shape == (rows, padded // quant.group)
    assert np.isfinite(scales).all()
    assert codes.min(initial=quant.zero) >= LOW[quant.name]
    assert codes.max(initial=quant.zero) <= HIGH[quant.name]
    assert not np.isin(codes, NEVER.get(quant.name, ())).any()
    assert (codes[:, width:] == quant.zero).all()
    assert (quant.dequantize(codes, scales, padded)[:, width:] == 0).all()
    assert (groups(codes, quant)[scales == 0] == quant.zero).all()
    back = quant.dequantize(codes, scales, width)
    assert back.dtype == np.float32
    assert back.shape == weights.shape
    exact = np.repeat(scales.astype(np.float64), quant.group, 1) * VALUES[quant.name][codes]
    np.testing.assert_array_equal(back, exact[:, :width])
    wide = weights.astype(np.float64)
    error = np.abs(groups(back.astype(np.float64) - wide, quant)).max(axis=2)
    bound = quant.error_bound(np.abs(groups(wide, quant)).max(axis=2))
    assert (error <= bound * (1 + 1e-6)).all()
    np.testing.assert_array_equal(quant.unpack(quant.pack(codes)), codes)
    assert quant.pack(codes).nbytes * 8 == codes.size * quant.bits
    return back


MATRICES = st.tuples(st.integers(1, 3), st.integers(1, 70) | st.integers(120, 270)).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-60000, 60000, width=32))
)


@each
@settings(max_examples=60)
@given(weights=MATRICES, exponent=st.integers(-40, 0))
def test_round_trip(quant: QuantFormat, weights: Array, exponent: int) -> None:
    """At any magnitude: subnormal scales, and scales that are zero, have their bound too."""
    check_round_trip(weights * np.float32(2.0**exponent), quant)


@each
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_any_dtype_and_many_rows(quant: QuantFormat, dtype: Any) -> None:
    """More than one block of rows; each row is quantized as it would be alone."""
    step = BLOCK // quant.padded(75)
    weights = np.random.default_rng(1).standard_normal((2 * step + 3, 75)).astype(dtype)
    check_round_trip(weights, quant)
    codes, scales = quant.quantize(weights)
    for row in (0, step, len(weights) - 1):
        alone = quant.quantize(weights[row : row + 1])
        np.testing.assert_array_equal(alone[0][0], codes[row])
        np.testing.assert_array_equal(alone[1][0], scales[row])


@each
@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (1, 1), (2, 32), (2, 33), (2, 128), (1, 129)])
def test_shapes(quant: QuantFormat, shape: tuple[int, int]) -> None:
    check_round_trip(np.ones(shape, np.float32), quant)


@pytest.mark.parametrize("name", ["q8", "q8g128", "fp8"])
@given(weights=MATRICES)
def test_eight_bits_twice_are_eight_bits_once(name: str, weights: Array) -> None:
    """The largest magnitude is 127 or 448 scales, so it gives the same scale again (a subnormal scale need not)."""
    quant = FORMATS[name]
    codes, scales = quant.quantize(weights)
    again, same = quant.quantize(quant.dequantize(codes, scales, weights.shape[1]))
    normal = scales >= np.finfo(np.float16).smallest_normal
    np.testing.assert_array_equal(same[normal], scales[normal])
    np.testing.assert_array_equal(groups(again, quant)[normal], groups(codes, quant)[normal])


@each
def test_what_the_codes_can_say_is_kept(quant: QuantFormat) -> None:
    codes = [c for c in range(LOW[quant.name], HIGH[quant.name] + 1) if c not in NEVER.get(quant.name, ())]
    says = VALUES[quant.name][codes]
    weights = np.random.default_rng(2).choice(says, (50, quant.group)).astype(np.float32) / 8
    weights[:, 0] = says.min() / 8
    np.testing.assert_array_equal(check_round_trip(weights, quant), weights)


def test_the_search_finds_better_scales_than_the_largest_weight_gives() -> None:
    weights = np.random.default_rng(4).standard_normal((400, 32)).astype(np.float32)
    back = check_round_trip(weights, FORMATS["q4"])
    largest = weights[np.arange(400), np.abs(weights).argmax(1)][:, None]
    plain = np.clip(np.rint(weights / largest * -8), -8, 7) * largest / -8
    error, plain_error = (np.sum(np.abs(weights) * (w - weights) ** 2) for w in (back, plain))
    assert error < 0.9 * plain_error


def test_a_float_of_8_bits_is_the_nearest_one() -> None:
    """Of all finite patterns, for weights over seven decades of magnitude; so it keeps 4 bits of each but the least."""
    quant, rng = FORMATS["fp8"], np.random.default_rng(6)
    weights = (rng.standard_normal((20, 128)) * 10.0 ** rng.uniform(-7, 0, (20, 128))).astype(np.float32)
    codes, scales = quant.quantize(weights)
    scaled = weights.astype(np.float64) / scales.astype(np.float64)
    finite = VALUES["fp8"][np.isfinite(VALUES["fp8"])]
    nearest = np.abs(scaled[:, :, None] - finite).min(axis=2)
    error = np.abs(scaled - VALUES["fp8"][codes])
    np.testing.assert_allclose(error, nearest, rtol=0, atol=1e-4 * np.abs(scaled).min(where=scaled != 0, initial=1))
    assert (error <= np.maximum(2.0**-4 * np.abs(scaled), 2.0**-10)).all()
    largest = np.abs(weights).max(1)
    np.testing.assert_allclose(scales[:, 0].astype(np.float64), largest / 448, rtol=2.0**-11)


def test_bits() -> None:
    assert {n: (f.name, f.kind, f.bits, f.group, f.zero, f.bits_per_weight) for n, f in FORMATS.items()} == {
        "q8": ("q8", "integer", 8, 32, 128, 8.5),
        "q4": ("q4", "integer", 4, 32, 8, 4.5),
        "q8g128": ("q8g128", "integer", 8, 128, 128, 8.125),
        "q4g64": ("q4g64", "integer", 4, 64, 8, 4.25),
        "q4g128": ("q4g128", "integer", 4, 128, 8, 4.125),
        "fp8": ("fp8", "e4m3", 8, 128, 0, 8.125),
    }
    assert INTEGER_FORMATS == ("q8", "q4")
    assert FORMATS["q4"].pack(np.array([[1, 2, 15, 0]], np.uint8)).tolist() == [[0x21, 0x0F]]


@each
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite(quant: QuantFormat, value: float) -> None:
    weights = np.zeros((3, 40))
    weights[2, 33] = value
    with pytest.raises(LlmcError, match=rf"the weight \[2, 33\] is {value}; {quant.name} takes finite numbers only"):
        quant.quantize(weights)


@each
@pytest.mark.parametrize("value", [1e8, -1e8, 3e38])
def test_weights_that_are_too_large(quant: QuantFormat, value: float) -> None:
    with pytest.raises(LlmcError, match="needs a scale above 65504"):
        quant.quantize(np.full((2, 32), value, np.float32))


def test_an_unknown_format() -> None:
    with pytest.raises(LlmcError, match="no weight format 'q44'; did you mean 'q4'"):
        format_named("q44")


def test_the_pack_program_quantizes_once() -> None:
    """Codes and scales come out of one reading of the weight, in their storage dtypes."""
    b, asked = Builder(), []

    def load(name: str) -> Array:
        asked.append(name)
        return np.random.default_rng(0).standard_normal((4, 40)).astype(ml_dtypes.bfloat16)

    codes, scales = b.quantize_weight(b.param("w", DType.BF16, (4, 40)), format="q4")
    kept: dict[Any, Array] = {}
    arrays = [evaluate_parameters(v, load, kept) for v in (codes, scales)]
    assert asked == ["w"]
    assert not kept
    for array, want in zip(arrays, FORMATS["q4"].quantize(load("w")), strict=True):
        assert array.dtype == want.dtype
        np.testing.assert_array_equal(array, want)
