"""Tensor types: element types, symbolic dimensions, shapes."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llmc.ir.errors import LlmcError


class DType(enum.Enum):
    """An element type. `.bits` is its storage width, `.numpy` the array type that holds it."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    F8E4M3 = "f8e4m3"
    I64 = "i64"
    I32 = "i32"
    I8 = "i8"
    U8 = "u8"
    BOOL = "bool"

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy type of storage arrays (bf16 and f8e4m3 through ml_dtypes)."""
        return _NUMPY[self]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.numpy.itemsize

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return self.itemsize * 8

    @property
    def is_float(self) -> bool:
        """Whether values are real numbers (computed in float64 by the interpreter)."""
        return self in (DType.F64, DType.F32, DType.F16, DType.BF16, DType.F8E4M3)

    @property
    def oracle(self) -> np.dtype[Any]:
        """The numpy type in which the interpreter computes: float64, int64 or bool. Codes of weights (u8), which are
        many and only converted, stay as they are."""
        if self.is_float:
            return np.dtype(np.float64)
        if self is DType.U8:
            return np.dtype(np.uint8)
        return np.dtype(np.bool_) if self is DType.BOOL else np.dtype(np.int64)

    def store(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array in this storage dtype, floats rounded to nearest even. f8e4m3, which has no infinity, saturates:
        what is beyond ±448 becomes ±448, and NaN stays NaN, as GPUs convert."""
        if self is DType.F8E4M3:
            array = np.clip(array, -F8E4M3_LARGEST, F8E4M3_LARGEST)
        return array.astype(self.numpy)

    def __str__(self) -> str:
        return self.value


F8E4M3_LARGEST = 448.0
"""The largest number of f8e4m3: 4 bits of exponent and 3 of mantissa, after ml_dtypes' float8_e4m3fn."""

_NUMPY: dict[DType, np.dtype[Any]] = {
    DType.F64: np.dtype(np.float64),
    DType.F32: np.dtype(np.float32),
    DType.F16: np.dtype(np.float16),
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.F8E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    DType.I64: np.dtype(np.int64),
    DType.I32: np.dtype(np.int32),
    DType.I8: np.dtype(np.int8),
    DType.U8: np.dtype(np.uint8),
    DType.BOOL: np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Sym:
    """A size known only at run time, with bounds: specialisation is a question about bounds."""

    name: str
    min: int = 1
    max: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise LlmcError(f"symbol name {self.name!r} is not an identifier")
        if self.min < 0 or (self.max is not None and self.max < self.min) or self.multiple_of < 1:
            bounds = f"{self.min}..{self.max}, multiple of {self.multiple_of}"
            raise LlmcError(f"symbol {self.name}: bounds {bounds} are empty")


@dataclass(frozen=True)
class FloorDiv:
    """`numerator // divisor`, kept whole inside a linear expression."""

    numerator: Linear
    divisor: int


Atom: TypeAlias = Sym | FloorDiv


@dataclass(frozen=True)
class Linear:
    """A linear expression over symbols: sum of coefficient × atom, plus a constant.

    Always canonical (terms sorted by text, no zero coefficient, at least one term), so `==` decides equality.
    """

    terms: tuple[tuple[Atom, int], ...]
    constant: int = 0

    def __add__(self, other: Dim) -> Dim:
        return _sum(self, other, 1)

    __radd__ = __add__

    def __sub__(self, other: Dim) -> Dim:
        return _sum(self, other, -1)

    def __rsub__(self, other: int) -> Dim:
        return _sum(self * -1, other, 1)

    def __mul__(self, factor: int) -> Dim:
        if not isinstance(factor, int):
            raise LlmcError(f"dimensions are linear: cannot multiply {self} by {factor}")
        return _linear({a: c * factor for a, c in self.terms}, self.constant * factor)

    __rmul__ = __mul__

    def __floordiv__(self, divisor: int) -> Dim:
        if not isinstance(divisor, int) or divisor < 1:
            raise LlmcError(f"dimensions are divided by positive integers only: {self} // {divisor}")
        if divisor == 1:
            return self
        quotient = _linear({a: c // divisor for a, c in self.terms}, self.constant // divisor)
        rest = {a: c % divisor for a, c in self.terms if c % divisor}
        if not rest:
            return quotient
        common = math.gcd(divisor, *rest.values())
        inner = _linear({a: c // common for a, c in rest.items()}, self.constant % divisor // common)
        assert isinstance(inner, Linear)
        return _sum(quotient, _floor(inner, divisor // common), 1)

    def __str__(self) -> str:
        parts = []
        for atom, coefficient in self.terms:
            name = atom.name if isinstance(atom, Sym) else f"({atom.numerator})//{atom.divisor}"
            parts.append(name if coefficient == 1 else f"{coefficient}*{name}")
        if self.constant:
            parts.append(str(self.constant))
        return " + ".join(parts)


Dim: TypeAlias = int | Linear
Shape: TypeAlias = tuple[Dim, ...]


def symbol(name: str, min: int = 1, max: int | None = None, multiple_of: int = 1) -> Linear:
    """A dimension that is one symbol."""
    return Linear(((Sym(name, min, max, multiple_of), 1),))


def symbols_of(dim: Dim) -> set[Sym]:
    """The symbols that a dimension depends on."""
    if isinstance(dim, int):
        return set()
    found: set[Sym] = set()
    for atom, _ in dim.terms:
        found |= {atom} if isinstance(atom, Sym) else symbols_of(atom.numerator)
    return found


def substitute(dim: Dim, values: Mapping[str, Dim]) -> Dim:
    """The dimension with symbols (by name) replaced by integers or other dimensions."""
    if isinstance(dim, int):
        return dim
    total: Dim = dim.constant
    for atom, coefficient in dim.terms:
        if isinstance(atom, Sym):
            value: Dim = values.get(atom.name, Linear(((atom, 1),)))
        else:
            value = substitute(atom.numerator, values) // atom.divisor
        total = total + value * coefficient
    return total


def evaluate(dim: Dim, values: Mapping[str, int]) -> int:
    """The dimension's value; every symbol must be given."""
    result = substitute(dim, values)
    if isinstance(result, int):
        return result
    missing = sorted(s.name for s in symbols_of(result))
    raise LlmcError(f"dimension {dim} needs a value for {', '.join(missing)}; given: {dict(values)}")


def upper_bound(dim: Dim) -> int:
    """A size that the dimension does not exceed under the symbols' bounds; exact where no symbol occurs twice."""
    return _extreme(dim, True)


def _extreme(dim: Dim, high: bool) -> int:
    """A bound from above or from below, term by term."""
    if isinstance(dim, int):
        return dim
    total = dim.constant
    for atom, coefficient in dim.terms:
        upward = high == (coefficient > 0)
        if isinstance(atom, FloorDiv):
            value = _extreme(atom.numerator, upward) // atom.divisor
        elif upward and atom.max is None:
            raise LlmcError(f"dimension {dim}: symbol {atom.name} has no upper bound")
        else:
            value = atom.max if upward and atom.max is not None else atom.min
        total += coefficient * value
    return total


@dataclass(frozen=True)
class TensorType:
    """An element type and a shape."""

    dtype: DType
    shape: Shape

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def symbols(self) -> set[Sym]:
        """All symbols in the shape."""
        return set().union(*(symbols_of(d) for d in self.shape)) if self.shape else set()

    def substitute(self, values: Mapping[str, Dim]) -> TensorType:
        """The same type with symbols replaced."""
        return TensorType(self.dtype, tuple(substitute(d, values) for d in self.shape))

    def concrete(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """The shape as integers."""
        return tuple(evaluate(d, values) for d in self.shape)

    @property
    def elements(self) -> int:
        """Number of elements of a shape without symbols."""
        return math.prod(self.concrete({}))

    @property
    def bytes(self) -> int:
        """Bytes of a tensor without symbols."""
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def broadcast(left: Shape, right: Shape) -> Shape | None:
    """The shape of an elementwise result by numpy's rule; None where the shapes do not fit."""
    result: list[Dim] = []
    for i in range(max(len(left), len(right))):
        a: Dim = left[len(left) - 1 - i] if i < len(left) else 1
        b: Dim = right[len(right) - 1 - i] if i < len(right) else 1
        if a != b and a != 1 and b != 1:
            return None
        result.append(b if a == 1 else a)
    return tuple(reversed(result))


def product(shape: Shape) -> tuple[int, tuple[str, ...]]:
    """A shape's element count as (integer factor, sorted texts of symbolic factors); equal: the same at any size."""
    factor, symbolic = 1, []
    for dim in shape:
        if isinstance(dim, int):
            factor *= dim
        elif not dim.constant and len(dim.terms) == 1:
            factor *= dim.terms[0][1]
            symbolic.append(str(Linear(((dim.terms[0][0], 1),))))
        else:
            symbolic.append(str(dim))
    return factor, tuple(sorted(symbolic))


def _floor(numerator: Linear, divisor: int) -> Dim:
    """`numerator // divisor`, whose coefficients are already below the divisor; (n // d + k) // e is one division."""
    atom, coefficient = numerator.terms[0]
    if len(numerator.terms) == 1 and coefficient == 1 and isinstance(atom, FloorDiv):
        return (atom.numerator + numerator.constant * atom.divisor) // (atom.divisor * divisor)
    return Linear(((FloorDiv(numerator, divisor), 1),))


def _linear(terms: Mapping[Atom, int], constant: int) -> Dim:
    kept = [(a, c) for a, c in terms.items() if c]
    if not kept:
        return constant
    kept.sort(key=lambda t: t[0].name if isinstance(t[0], Sym) else f"~{t[0].numerator}//{t[0].divisor}")
    return Linear(tuple(kept), constant)


def _sum(left: Dim, right: Dim, sign: int) -> Dim:
    terms: dict[Atom, int] = {}
    constant = 0
    for dim, factor in ((left, 1), (right, sign)):
        if isinstance(dim, int):
            constant += dim * factor
        elif isinstance(dim, Linear):
            constant += dim.constant * factor
            for atom, coefficient in dim.terms:
                terms[atom] = terms.get(atom, 0) + coefficient * factor
        else:
            raise LlmcError(f"a dimension is an integer or an expression of symbols, not {dim!r}")
    return _linear(terms, constant)
