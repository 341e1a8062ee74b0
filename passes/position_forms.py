"""Integers that depend on positions: sums of vectors along the axes of a value, read from whatever ops make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmc.ir.op import Value
from llmc.ir.ops.elementwise import Add, AddScalar, Cast, Mul, MulScalar, Neg, Sub
from llmc.ir.ops.shape import Constant, Expand, Reshape, Transpose
from llmc.ir.types import DType, Shape

_EXACT = (DType.F32, DType.F64, DType.I32, DType.I64)
"""What holds every position."""


@dataclass(frozen=True)
class Form:
    """Sum of coefficient · vector, each vector [n] along one axis, plus a constant. Axes are counted from the last,
    which is 0, so that they stay what they are where values broadcast."""

    terms: Mapping[tuple[int, Value], float]
    constant: float = 0.0

    def plus(self, other: Form, factor: float = 1.0) -> Form:
        """self + factor · other."""
        terms = dict(self.terms)
        for term, coefficient in other.terms.items():
            terms[term] = terms.get(term, 0.0) + factor * coefficient
        kept = {term: coefficient for term, coefficient in terms.items() if coefficient}
        return Form(kept, self.constant + factor * other.constant)

    def times(self, factor: float) -> Form:
        """factor · self."""
        return Form({}).plus(self, factor)

    def along(self, axis: int) -> dict[Value, float]:
        """The coefficients of the vectors along an axis."""
        return {vector: c for (a, vector), c in self.terms.items() if a == axis}


def form(value: Value) -> Form | None:
    """The form of a value, if it has one. A vector of which nothing more is known stands for itself."""
    return _read(value, {})


def _read(value: Value, known: dict[Value, Form | None]) -> Form | None:
    """`form`, which looks at each value once."""
    if value not in known:
        number = single(value)
        found = _made(value, known) if number is None else Form({}, number)
        known[value] = Form({(0, value): 1.0}) if found is None and value.type.rank == 1 else found
    return known[value]


def _made(value: Value, known: dict[Value, Form | None]) -> Form | None:
    op, inputs = value.op, value.node.inputs
    if not isinstance(op, Add | Sub | AddScalar | MulScalar | Neg | Mul | Cast | Reshape | Expand | Transpose):
        return None
    parts = [part for v in inputs if (part := _read(v, known)) is not None]
    if len(parts) < len(inputs):
        return None
    match op:
        case Add():
            return parts[0].plus(parts[1])
        case Sub():
            return parts[0].plus(parts[1], -1.0)
        case AddScalar():
            return parts[0].plus(Form({}, op.value))
        case MulScalar():
            return parts[0].times(op.value)
        case Neg():
            return parts[0].times(-1.0)
        case Mul():
            number, rest = parts if not parts[0].terms else parts[::-1]
            return None if number.terms else rest.times(number.constant)
        case Cast():
            exact = op.dtype in _EXACT and (op.dtype.is_float or not inputs[0].type.dtype.is_float)
            return parts[0] if exact else None
    return moved(parts[0], value)


def moved(given: Form, value: Value) -> Form | None:
    """The form of a value that is the given one in another layout; None where an axis is cut or joined."""
    before, after = value.node.inputs[0].type.shape, value.type.shape
    terms: dict[tuple[int, Value], float] = {}
    for (axis, vector), coefficient in given.terms.items():
        index = len(before) - 1 - axis
        match value.op:
            case Transpose(axes):
                index = axes.index(index)
            case Expand():
                index += len(after) - len(before)
            case _ if squeezed(before) == squeezed(after):
                place = [i for i, d in enumerate(before) if d != 1].index(index)
                index = [i for i, d in enumerate(after) if d != 1][place]
            case _:
                return None
        terms[len(after) - 1 - index, vector] = coefficient
    return Form(terms, given.constant)


def squeezed(shape: Shape) -> Shape:
    """The shape without its axes of size 1."""
    return tuple(d for d in shape if d != 1)


def single(value: Value) -> float | None:
    """The number that a constant holds everywhere; None where there is no such number."""
    while isinstance(value.op, Reshape | Expand):
        (value,) = value.node.inputs
    if not isinstance(value.op, Constant) or not value.op.value.array.size:
        return None
    array = value.op.value.array.reshape(-1)
    return float(array[0]) if (array == array[0]).all() else None
