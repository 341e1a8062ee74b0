"""Dimensions: a canonical form decides equality, and arithmetic means what it means on numbers."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.ir.errors import LlmcError
from llmc.ir.types import (
    Dim,
    DType,
    Linear,
    Sym,
    TensorType,
    broadcast,
    evaluate,
    product,
    substitute,
    symbol,
    symbols_of,
    upper_bound,
)

SYMBOLS = {"a": symbol("a", 1, 8), "b": symbol("b", 2, 6, 2), "c": symbol("c", 0, 5)}
VALUES = st.fixed_dictionaries({"a": st.integers(1, 8), "b": st.sampled_from([2, 4, 6]), "c": st.integers(0, 5)})


@st.composite
def expressions(draw: st.DrawFn, depth: int = 4) -> tuple[Dim, str]:
    """A dimension built by arithmetic, and the same as Python text."""
    kind = draw(st.integers(0, 5 if depth else 1))
    if kind == 0:
        number = draw(st.integers(0, 9))
        return number, str(number)
    if kind == 1:
        name = draw(st.sampled_from(sorted(SYMBOLS)))
        return SYMBOLS[name], name
    left, text = draw(expressions(depth - 1))
    factor = draw(st.integers(1, 5))
    if kind == 2:
        return left * factor, f"({text}) * {factor}"
    if kind == 3:
        return left // factor, f"({text}) // {factor}"
    right, other = draw(expressions(depth - 1))
    return (left + right, f"({text}) + ({other})") if kind == 4 else (left - right, f"({text}) - ({other})")


@given(expressions(), VALUES)
def test_arithmetic_is_that_of_integers(drawn: tuple[Dim, str], values: dict[str, int]) -> None:
    dim, text = drawn
    assert evaluate(dim, values) == eval(text, {}, values)  # noqa: S307 - the text was made above


@given(expressions(), expressions(), st.integers(1, 5))
def test_equal_expressions_are_one(x: tuple[Dim, str], y: tuple[Dim, str], k: int) -> None:
    a, b = x[0], y[0]
    assert a + b == b + a
    assert (a + b) - b == a
    assert a * k + b * k == (a + b) * k
    assert (a * k) // k == a
    assert hash(a + b) == hash(b + a)
    assert (a + b * k) // k == a // k + b


@given(expressions(), VALUES)
def test_a_bound_is_not_exceeded(drawn: tuple[Dim, str], values: dict[str, int]) -> None:
    assert upper_bound(drawn[0]) >= evaluate(drawn[0], values)


@given(expressions(), VALUES)
def test_substitution_commutes_with_evaluation(drawn: tuple[Dim, str], values: dict[str, int]) -> None:
    dim, _ = drawn
    one = substitute(dim, {"a": SYMBOLS["c"] + 1})
    assert evaluate(one, values) == evaluate(dim, {**values, "a": values["c"] + 1})


def test_texts() -> None:
    a, b = SYMBOLS["a"], SYMBOLS["b"]
    assert str(a * 2 + b + 1) == "2*a + b + 1"
    assert str((a + 15) // 16) == "(a + 15)//16"
    assert str((a * 33 + b + 3) // 16) == "2*a + (a + b + 3)//16"
    assert str((a * 4 + 7) // 8) == "(a + 1)//2"
    assert (a // 2 + 1) // 3 == (a + 2) // 6
    assert str(TensorType(DType.BF16, (a, 4))) == "bf16[a, 4]"
    assert str(TensorType(DType.F32, ())) == "f32[]"
    assert a - a == 0
    assert isinstance(a - a, int)


def test_bounds() -> None:
    a, b = SYMBOLS["a"], SYMBOLS["b"]
    assert upper_bound(10 - a) == 9
    assert upper_bound(a * 2 - b) == 14
    assert upper_bound((a + 15) // 16) == 1
    assert symbols_of((a + b) // 3) == {Sym("a", 1, 8), Sym("b", 2, 6, 2)}
    with pytest.raises(LlmcError, match="symbol t has no upper bound"):
        upper_bound(symbol("t") + 1)
    assert upper_bound(10 - symbol("t")) == 9


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda a: a * 1.5, "dimensions are linear"),
        (lambda a: a * a, "dimensions are linear"),
        (lambda a: a // 0, "divided by positive integers"),
        (lambda a: a // a, "divided by positive integers"),
        (lambda a: a + 0.5, "an integer or an expression of symbols"),
        (lambda a: symbol("no name"), "is not an identifier"),
        (lambda a: symbol("x", 5, 4), r"bounds 5\.\.4, multiple of 1 are empty"),
        (lambda a: symbol("x", -1), "are empty"),
        (lambda a: symbol("x", 1, 4, 0), "are empty"),
        (lambda a: evaluate(a + 1, {}), r"dimension a \+ 1 needs a value for a; given: \{\}"),
    ],
)
def test_mistakes(wrong: object, message: str) -> None:
    assert callable(wrong)
    with pytest.raises(LlmcError, match=message):
        wrong(SYMBOLS["a"])


SHAPES = st.lists(st.sampled_from([1, 2, 3]), max_size=4).map(tuple)


@given(SHAPES, SHAPES)
def test_broadcasting_is_numpys(x: tuple[int, ...], y: tuple[int, ...]) -> None:
    try:
        expected = np.broadcast_shapes(x, y)
    except ValueError:
        expected = None
    assert broadcast(x, y) == expected


def test_broadcasting_of_symbols() -> None:
    a, b = SYMBOLS["a"], SYMBOLS["b"]
    assert broadcast((a, 1), (1, b)) == (a, b)
    assert broadcast((a,), (b,)) is None
    assert broadcast((a,), (2, 1, a)) == (2, 1, a)


def test_products_decide_whether_a_reshape_is_one() -> None:
    a, b = SYMBOLS["a"], SYMBOLS["b"]
    assert product((a, 4, b)) == product((b, 2 * a, 2))
    assert product((a, a)) != product((a,))
    assert product((a + 1, 2)) != product((a, 2))
    assert product((a + 1, 2)) == product((2, a + 1))


@pytest.mark.parametrize("dtype", list(DType))
def test_dtypes(dtype: DType) -> None:
    assert dtype.bits == 8 * dtype.itemsize == 8 * dtype.numpy.itemsize
    special = {DType.BOOL: np.bool_, DType.U8: np.uint8}
    assert dtype.oracle == (np.float64 if dtype.is_float else special.get(dtype, np.int64))
    assert str(dtype) == dtype.value


def test_sizes() -> None:
    type = TensorType(DType.BF16, (3, SYMBOLS["a"]))
    assert DType.BF16.numpy == np.dtype(ml_dtypes.bfloat16)
    assert type.concrete({"a": 5}) == (3, 5)
    assert type.substitute({"a": 5}).bytes == 30
    assert type.symbols == {Sym("a", 1, 8)}
    with pytest.raises(LlmcError, match="needs a value for a"):
        _ = type.elements
    assert TensorType(DType.F32, ()).elements == math.prod(())
    assert isinstance(SYMBOLS["a"], Linear)


def test_storing() -> None:
    """f8e4m3 has no infinity: it saturates; other floats overflow as ever, integers are as they are."""
    given = np.array([1e9, -449.0, np.inf, np.nan, 17.0, -0.1])
    stored = DType.F8E4M3.store(given)
    assert stored.dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(stored.astype(np.float64), [448, -448, 448, np.nan, 16, -0.1015625])
    assert np.isnan(given[3]), "in place"
    np.testing.assert_array_equal(DType.F16.store(np.array([7.0, np.inf])).astype(np.float64), [7, np.inf])
    assert DType.I8.store(np.array([-3])).tolist() == [-3]
