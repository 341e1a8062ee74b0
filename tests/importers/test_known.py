"""Index arithmetic of exports: whatever is composed, its elements are numpy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.importers.export.known import (
    Affine,
    Choice,
    Condition,
    Known,
    Line,
    Unknown,
    both,
    choice,
    compared,
    computed,
    constant,
    either,
    gathered,
    inverted,
    iota,
    joined,
    moved,
    multiplied,
    running_sum,
    sliced,
    spread,
    summed,
    triangle,
)
from llmc.ir.types import DType

Array = npt.NDArray[Any]


def elements(x: Known) -> Array:
    """All elements, from the linear form."""
    shape = tuple(int(d) for d in x.shape if isinstance(d, int))
    grid = np.indices(shape)

    def line(given: Line) -> Array:
        terms = [c * g for c, g in zip(given.coefficients, grid, strict=True)]
        total: Array = np.full(shape, given.constant)
        for term in terms:
            total = total + term
        return total

    if isinstance(x, Affine):
        return line(x.line)
    if isinstance(x, Condition):
        return np.asarray(np.logical_and.reduce([np.full(shape, not x.never), *(line(n) >= 0 for n in x.lines)]))
    return np.where(elements(x.condition), x.chosen, x.other)


def indices(data: st.DataObject) -> tuple[Known, Array]:
    """Row or column indices of a [5, 7], moved and stretched."""
    axis, start, step = data.draw(st.sampled_from([0, 1])), data.draw(st.integers(-3, 3)), data.draw(st.integers(1, 3))
    size = (5, 7)[axis]
    flat = iota(size, DType.I64, start, step)
    shape = (size, 1) if axis == 0 else (1, size)
    array = np.arange(start, start + size * step, step).reshape(shape)
    return moved(flat, shape, [0, None] if axis == 0 else [None, 0]), array


@given(data=st.data())
def test_composed_arithmetic_is_numpys(data: st.DataObject) -> None:
    (x, a), (y, b) = indices(data), indices(data)
    factor, sign = data.draw(st.integers(-2, 2)), data.draw(st.sampled_from([1, -1]))
    total = summed(multiplied(x, constant(factor, (), DType.I64), DType.I64), y, sign, DType.I64)
    expected = a * factor + sign * b
    np.testing.assert_array_equal(elements(total), expected)
    name = data.draw(st.sampled_from(["ge", "gt", "le", "lt", "eq"]))
    condition, flags = compared(name, x, y), {"ge": a >= b, "gt": a > b, "le": a <= b, "lt": a < b, "eq": a == b}[name]
    np.testing.assert_array_equal(elements(condition), flags)
    np.testing.assert_array_equal(elements(both(condition, compared("ge", y, x))), flags & (b >= a))
    if name != "eq":
        np.testing.assert_array_equal(elements(inverted(condition)), ~flags)
        np.testing.assert_array_equal(elements(spread(condition, (2, 5, 7))), np.broadcast_to(flags, (2, 5, 7)))
        masked, two = choice(condition, 3, -4, DType.I64), constant(2, (), DType.I64)
        np.testing.assert_array_equal(elements(compared("lt", masked, two)), np.where(flags, 3, -4) < 2)
    masked = choice(condition, 3, -4, DType.I64)
    np.testing.assert_array_equal(elements(computed(lambda v: v * v, masked, dtype=DType.I64)), np.where(flags, 9, 16))
    two = constant(2, (), DType.I64)
    np.testing.assert_array_equal(elements(summed(two, masked, -1, DType.I64)), 2 - np.where(flags, 3, -4))


@given(data=st.data())
def test_slices_gathers_and_joins_are_numpys(data: st.DataObject) -> None:
    axis, start, step = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))
    both_axes = summed(
        moved(iota(5, DType.I64), (5, 1), [0, None]), moved(iota(7, DType.I64), (1, 7), [None, 0]), 1, DType.I64
    )
    square = compared("le", both_axes, constant(data.draw(st.integers(-1, 13)), (), DType.I64))
    for x in (both_axes, square, choice(square, 1, 0, DType.I64)):
        whole = elements(x)
        cut = whole[start::step] if axis == 0 else whole[:, start::step]
        np.testing.assert_array_equal(elements(sliced(x, axis, start, step, cut.shape[axis])), cut)
        rows, columns = iota(3, DType.I64, 1), iota(3, DType.I64, 2, 2)
        np.testing.assert_array_equal(elements(gathered(x, [rows, columns])), whole[[1, 2, 3], [2, 4, 6]])
        np.testing.assert_array_equal(elements(gathered(x, [rows])), whole[[1, 2, 3]])
    parts = [sliced(both_axes, 1, 0, 1, 1), sliced(both_axes, 1, 1, 1, 6)]
    np.testing.assert_array_equal(elements(joined(parts, 1)), elements(both_axes))


@pytest.mark.parametrize("diagonal", [-2, 0, 1])
@pytest.mark.parametrize("upper", [True, False])
def test_triangles_and_running_sums(diagonal: int, upper: bool) -> None:
    ones = constant(1.0, (4, 6), DType.F32)
    side = np.triu if upper else np.tril
    np.testing.assert_array_equal(elements(triangle(ones, diagonal, upper)), side(np.ones((4, 6)), diagonal))
    flags = constant(True, (4, 6), DType.BOOL)
    np.testing.assert_array_equal(elements(triangle(flags, diagonal, upper)), side(np.ones((4, 6), bool), diagonal))
    counted = running_sum(constant(2, (4, 6), DType.I64), 1)
    np.testing.assert_array_equal(elements(counted), np.cumsum(np.full((4, 6), 2), 1))


def test_what_is_always_or_never_so_is_decided() -> None:
    row, column = (moved(iota(4, DType.I64), s, a) for s, a in (((4, 1), (0, None)), ((1, 4), (None, 0))))
    always, causal = compared("eq", row, row), compared("ge", row, column)
    assert always.number is True and inverted(always).number is False
    assert both(always, causal) == causal == either(inverted(always), causal)
    assert either(always, causal).number is True
    assert either(causal, causal) == causal
    with pytest.raises(Unknown, match="the opposite of several conditions"):
        either(causal, compared("lt", row, column))


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda i, c: multiplied(i, i, DType.I64), "a product of indices"),
        (lambda i, c: multiplied(i, constant(0.5, (), DType.F32), DType.F32), "times a number that is no integer"),
        (lambda i, c: compared("ne", i, constant(2, (), DType.I64)), "indices that must differ"),
        (lambda i, c: inverted(compared("eq", i, constant(2, (), DType.I64))), "the opposite of several conditions"),
        (lambda i, c: summed(c, c, 1, DType.I64), "a sum of masks"),
        (lambda i, c: compared("eq", c, i), "a comparison of a mask with what is not one number"),
        (lambda i, c: computed(lambda v: v * v, i, dtype=DType.I64), "a function of indices that is not linear"),
        (lambda i, c: running_sum(i, 0), "a running sum of what is not one integer"),
        (lambda i, c: triangle(i, 0, True), "a triangle of what is not one number"),
        (lambda i, c: joined([i, i], 0), "a concatenation of indices that do not go on"),
        (lambda i, c: joined([c, i], 0), "a concatenation of conditions"),
        (lambda i, c: gathered(i, [c]), "a gather by something else than indices"),
        (lambda i, c: summed(i, constant(1, (3,), DType.I64), 1, DType.I64), "shapes .* that do not fit"),
    ],
)
def test_what_is_not_linear_says_so(compute: Any, message: str) -> None:
    index = iota(4, DType.I64)
    mask = choice(compared("ge", index, constant(2, (), DType.I64)), 1, 0, DType.I64)
    assert isinstance(mask, Choice)
    with pytest.raises(Unknown, match=message):
        compute(index, mask)
