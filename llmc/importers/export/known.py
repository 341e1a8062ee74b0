"""What an export computes of indices, known while it is read: positions, conditions on them, choices of numbers.

Exporters build positions and masks from `arange` by integer arithmetic, gathers and comparisons. All of it is linear in
the indices of the axes, so it is evaluated here and written into the graph in one form: an index along the tokens is
the token's position, a condition is comparisons of positions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from llmc.ir.types import Dim, DType, Shape, broadcast

Number: TypeAlias = int | float | bool


class Unknown(Exception):
    """Index arithmetic that has no linear form; the argument says what."""


@dataclass(frozen=True)
class Line:
    """coefficients · indices + constant; one coefficient for each axis."""

    coefficients: tuple[int, ...]
    constant: Number

    @property
    def fixed(self) -> bool:
        """Whether it is the constant alone."""
        return not any(self.coefficients)

    def __add__(self, other: Line) -> Line:
        pairs = zip(self.coefficients, other.coefficients, strict=True)
        return Line(tuple(a + b for a, b in pairs), self.constant + other.constant)

    def __mul__(self, factor: Number) -> Line:
        if not isinstance(factor, int) and not self.fixed:
            raise Unknown("indices times a number that is no integer")
        return Line(tuple(int(c * factor) for c in self.coefficients), self.constant * factor)

    def __sub__(self, other: Line) -> Line:
        return self + other * -1

    def moved(self, axes: Sequence[int | None]) -> Line:
        """The same over other axes: axis i is the former `axes[i]`, or new."""
        return replace(self, coefficients=tuple(0 if a is None else self.coefficients[a] for a in axes))


@dataclass(frozen=True)
class Affine:
    """A tensor whose elements are linear in their indices: a constant, or indices along axes."""

    shape: Shape
    dtype: DType
    line: Line

    def __post_init__(self) -> None:
        unit = tuple(c if d != 1 else 0 for c, d in zip(self.line.coefficients, self.shape, strict=True))
        object.__setattr__(self, "line", replace(self.line, coefficients=unit))

    @property
    def number(self) -> Number | None:
        """The value of all elements, if they have one."""
        return self.line.constant if self.line.fixed else None


@dataclass(frozen=True)
class Condition:
    """A tensor of flags: true where every line is at least 0. No lines: always, or where `never` never."""

    shape: Shape
    lines: tuple[Line, ...]
    never: bool = False
    dtype: DType = DType.BOOL

    @property
    def number(self) -> Number | None:
        """The flag of all elements, if they have one."""
        return None if self.lines else not self.never


@dataclass(frozen=True)
class Choice:
    """A tensor of two numbers: `chosen` where the condition holds, else `other`."""

    condition: Condition
    chosen: Number
    other: Number
    dtype: DType

    number = None

    @property
    def shape(self) -> Shape:
        """The condition's."""
        return self.condition.shape


Known: TypeAlias = Affine | Condition | Choice


def constant(value: Number, shape: Shape, dtype: DType) -> Known:
    """A tensor of one number."""
    if dtype is DType.BOOL:
        return Condition(shape, (), not value)
    return Affine(shape, dtype, Line((0,) * len(shape), float(value) if dtype.is_float else int(value)))


def iota(size: Dim, dtype: DType, start: int = 0, step: int = 1) -> Affine:
    """start, start + step, ... along one axis."""
    return Affine((size,), dtype, Line((step,), start))


def moved(x: Known, shape: Shape, axes: Sequence[int | None]) -> Known:
    """The tensor over other axes: axis i is the former `axes[i]`, or new and broadcast."""
    if isinstance(x, Affine):
        return Affine(shape, x.dtype, x.line.moved(axes))
    if isinstance(x, Condition):
        return replace(x, shape=shape, lines=_unique(line.moved(axes) for line in x.lines))
    condition = moved(x.condition, shape, axes)
    assert isinstance(condition, Condition)
    return replace(x, condition=condition)


def spread(x: Known, shape: Shape) -> Known:
    """The tensor broadcast to a shape."""
    new = len(shape) - len(x.shape)
    return moved(x, shape, [i - new if i >= new and x.shape[i - new] == shape[i] else None for i in range(len(shape))])


def sliced(x: Known, axis: int, start: int, step: int, size: Dim) -> Known:
    """Every `step`th element from `start` on along an axis."""
    shape = tuple(size if i == axis else d for i, d in enumerate(x.shape))

    def cut(line: Line) -> Line:
        factor = line.coefficients[axis]
        kept = tuple(
            c * step if i == axis and size != 1 else 0 if i == axis else c for i, c in enumerate(line.coefficients)
        )
        return Line(kept, line.constant + factor * start)

    if isinstance(x, Affine):
        return Affine(shape, x.dtype, cut(x.line))
    if isinstance(x, Condition):
        return _settled(shape, [cut(line) for line in x.lines], x.never)
    return choice(_settled(shape, [cut(line) for line in x.condition.lines]), x.chosen, x.other, x.dtype)


def gathered(x: Known, indices: Sequence[Known]) -> Known:
    """x[indices[0], indices[1], ...]: one for each of the first axes of x; the others follow."""
    shape: Shape = ()
    for index in indices:
        reached = broadcast(shape, index.shape)
        if reached is None or not isinstance(index, Affine):
            raise Unknown("a gather by something else than indices")
        shape = reached
    rest = x.shape[len(indices) :]
    lines = [index.line for index in (spread(i, shape) for i in indices) if isinstance(index, Affine)]

    def take(line: Line) -> Line:
        total = Line((0,) * len(shape), line.constant)
        for factor, index in zip(line.coefficients, lines, strict=False):
            total = total + index * factor
        return Line((*total.coefficients, *line.coefficients[len(indices) :]), total.constant)

    if isinstance(x, Affine):
        return Affine((*shape, *rest), x.dtype, take(x.line))
    if isinstance(x, Condition):
        return _settled((*shape, *rest), [take(line) for line in x.lines], x.never)
    return choice(_settled((*shape, *rest), [take(n) for n in x.condition.lines]), x.chosen, x.other, x.dtype)


def joined(parts: Sequence[Known], axis: int) -> Affine:
    """Pieces along an axis that go on where the one before ends."""
    size: Dim = 0
    whole: Line | None = None
    slopes = [p.line.coefficients[axis] for p in parts if isinstance(p, Affine) and p.shape[axis] != 1]
    slope = slopes[0] if slopes else None
    for part in parts:
        if not isinstance(part, Affine):
            raise Unknown("a concatenation of conditions")
        steps = list(part.line.coefficients)
        if slope is None:
            raise Unknown("a concatenation of single indices")
        if part.shape[axis] == 1:
            steps[axis] = slope
        if not isinstance(size, int):
            raise Unknown("a concatenation behind the tokens")
        line = Line(tuple(steps), part.line.constant - steps[axis] * size)
        if whole is not None and line != whole:
            raise Unknown("a concatenation of indices that do not go on")
        whole, size = line, size + part.shape[axis]
    first = parts[0]
    assert whole is not None and isinstance(first, Affine)
    return Affine(tuple(size if i == axis else d for i, d in enumerate(first.shape)), first.dtype, whole)


def running_sum(x: Known, axis: int) -> Known:
    """The cumulative sum of a constant along an axis: a multiple of the index and one more."""
    value = x.number
    if value is None or not isinstance(value, int):
        raise Unknown("a running sum of what is not one integer")
    steps = tuple(int(value) if i == axis else 0 for i in range(len(x.shape)))
    return Affine(x.shape, DType.I64, Line(steps, int(value)))


_COMPARISONS: dict[str, Callable[[Number, Number], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "lt": operator.lt,
}


def compared(name: str, x: Known, y: Known) -> Condition:
    """x ? y, element by element."""
    shape = _common(x, y)
    compare = _COMPARISONS[name]
    if isinstance(y, Choice) and not isinstance(x, Choice):
        flipped = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt"}
        return compared(flipped.get(name, name), y, x)
    if isinstance(x, Choice | Condition) and not (isinstance(x, Condition) and not x.lines):
        value, x = y.number, as_choice(x)
        if value is None:
            raise Unknown("a comparison of a mask with what is not one number")
        return _where(shape, x.condition, compare(x.chosen, value), compare(x.other, value))
    if x.number is not None and y.number is not None:
        return Condition(shape, (), not compare(x.number, y.number))
    if not (isinstance(x, Affine) and isinstance(y, Affine)):
        raise Unknown("a comparison of conditions with indices")
    difference = _line(x, shape) - _line(y, shape)
    if difference.fixed:
        return Condition(shape, (), not compare(difference.constant, 0))
    less_one = replace(difference, constant=difference.constant - 1)
    negative = difference * -1
    lines = {
        "ge": (difference,),
        "gt": (less_one,),
        "le": (negative,),
        "lt": (replace(negative, constant=negative.constant - 1),),
        "eq": (difference, negative),
    }
    if name not in lines:
        raise Unknown("indices that must differ")
    return Condition(shape, lines[name])


def inverted(x: Condition) -> Condition:
    """Where the condition does not hold."""
    if not x.lines:
        return replace(x, never=not x.never)
    if len(x.lines) > 1:
        raise Unknown("the opposite of several conditions together")
    (line,) = x.lines
    negative = line * -1
    return replace(x, lines=(replace(negative, constant=negative.constant - 1),))


def both(x: Condition, y: Condition) -> Condition:
    """Where both hold."""
    shape = _common(x, y)
    left, right = spread(x, shape), spread(y, shape)
    assert isinstance(left, Condition) and isinstance(right, Condition)
    if left.never or right.never:
        return Condition(shape, (), True)
    return Condition(shape, _unique((*left.lines, *right.lines)))


def either(x: Condition, y: Condition) -> Condition:
    """Where at least one holds; one of them must be always or never true, or both the same."""
    shape = _common(x, y)
    for a, b in ((x, y), (y, x)):
        if a.number is not None:
            result = spread(a if a.number else b, shape)
            assert isinstance(result, Condition)
            return result
    return inverted(both(inverted(x), inverted(y)))


def as_choice(x: Known) -> Choice:
    """Flags as the numbers 1 and 0."""
    if isinstance(x, Condition):
        return Choice(x, 1, 0, DType.I64)
    assert isinstance(x, Choice)
    return x


def choice(condition: Condition, chosen: Number, other: Number, dtype: DType) -> Known:
    """`chosen` where the condition holds, else `other`."""
    if condition.number is not None:
        return constant(chosen if condition.number else other, condition.shape, dtype)
    return Choice(condition, chosen, other, dtype)


def computed(function: Callable[..., Number], x: Known, *others: Number, dtype: DType) -> Known:
    """A function of each element; of indices only where they are one number."""
    if x.number is not None:
        return constant(function(x.number, *others), x.shape, dtype)
    if isinstance(x, Affine):
        raise Unknown("a function of indices that is not linear")
    x = as_choice(x)
    return choice(x.condition, function(x.chosen, *others), function(x.other, *others), dtype)


def summed(x: Known, y: Known, sign: int, dtype: DType) -> Known:
    """x + sign · y."""
    shape = _common(x, y)
    if isinstance(x, Affine) and isinstance(y, Affine):
        return Affine(shape, dtype, _line(x, shape) + _line(y, shape) * sign)
    if y.number is not None:
        result = computed(lambda a, b: a + sign * b, x, y.number, dtype=dtype)
    elif x.number is not None:
        result = computed(lambda b, a: a + sign * b, y, x.number, dtype=dtype)
    else:
        raise Unknown("a sum of masks")
    return spread(result, shape)


def multiplied(x: Known, y: Known, dtype: DType) -> Known:
    """x · y; one of them must be one number."""
    shape = _common(x, y)
    for a, b in ((x, y), (y, x)):
        if isinstance(a, Affine) and b.number is not None and not isinstance(b, Condition):
            return Affine(shape, dtype, _line(a, shape) * b.number)
        if b.number is not None:
            return spread(computed(lambda p, q: p * q, a, b.number, dtype=dtype), shape)
    raise Unknown("a product of indices")


def triangle(x: Known, diagonal: int, upper: bool) -> Known:
    """`tril` or `triu` of a tensor of one number: 0 on the other side of the diagonal."""
    value = x.number
    if value is None or len(x.shape) < 2:
        raise Unknown("a triangle of what is not one number")
    row, column = (tuple(int(i == len(x.shape) + k) for i in range(len(x.shape))) for k in (-2, -1))
    behind = Line(column, -diagonal) - Line(row, 0)
    kept = Condition(x.shape, (behind if upper else behind * -1,))
    return kept if x.dtype is DType.BOOL and value else choice(kept, value, 0, x.dtype)


def _where(shape: Shape, condition: Condition, chosen: bool, other: bool) -> Condition:
    if chosen == other:
        return Condition(shape, (), not chosen)
    result = spread(condition if chosen else inverted(condition), shape)
    assert isinstance(result, Condition)
    return result


def _common(x: Known, y: Known) -> Shape:
    shape = broadcast(x.shape, y.shape)
    if shape is None:
        raise Unknown(f"shapes {list(map(str, x.shape))} and {list(map(str, y.shape))} that do not fit")
    return shape


def _line(x: Affine, shape: Shape) -> Line:
    wide = spread(x, shape)
    assert isinstance(wide, Affine)
    return wide.line


def _unique(lines: object) -> tuple[Line, ...]:
    return tuple(dict.fromkeys(lines))  # type: ignore[call-overload]


def _settled(shape: Shape, lines: Sequence[Line], never: bool = False) -> Condition:
    """The condition with the lines that have become constants decided."""
    if never or any(line.fixed and line.constant < 0 for line in lines):
        return Condition(shape, (), True)
    return Condition(shape, _unique(line for line in lines if not line.fixed))
