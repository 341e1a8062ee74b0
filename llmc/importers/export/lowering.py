"""What all operators share while an export becomes a graph: the builder, the values so far, and how they are written.

A value is a `Value` of the graph; or it is `Known` (see known.py) and is written into the graph where an operator that
computes with numbers takes it. An index along the tokens is written as the token's position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from llmc.importers.export.archive import ExportFailure
from llmc.importers.export.known import Affine, Choice, Condition, Known, Line, Number, Unknown, constant, inverted
from llmc.importers.export.program import Call, Reference
from llmc.ir.builder import Builder
from llmc.ir.errors import LlmcError, nearest
from llmc.ir.graph import Input, Param
from llmc.ir.op import Value
from llmc.ir.types import Dim, DType, Linear, Shape

Tensor: TypeAlias = Value | Known
Handler: TypeAlias = Callable[["Operands"], Any]

HIDDEN = -1e30
"""Added to a score, this and what is less hides it."""

OPERATORS: dict[str, Handler] = {}
"""Operators by name and overload, as `add.Tensor`."""


def aten(*names: str) -> Callable[[Handler], Handler]:
    """Registers the function that lowers these operators."""

    def register(function: Handler) -> Handler:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass
class Lowering:
    """A graph while it is built. `activation` stands for the 16-bit types of the export."""

    b: Builder
    source: str
    activation: DType
    tokens: Linear
    values: dict[str, Any] = field(default_factory=dict)
    tables: list[int] = field(default_factory=list)
    """Lengths of the tables that are indexed by positions: none may be exceeded."""

    def run(self, call: Call) -> None:
        """Lower one node. Raises `ExportFailure` naming the node, its place and the operator."""
        name = call.target.removeprefix("torch.ops.aten.").removeprefix("torch.ops.")
        where = f"{self.source}: node {call.name!r} at {call.place or 'no module'}, {name}"
        handler = OPERATORS.get(name)
        if handler is None:
            raise ExportFailure(f"{where}: this operator is not supported; {nearest(name, OPERATORS)}")
        self.b.loc = call.place
        try:
            result = handler(Operands(self, call, name))
        except Unknown as unknown:
            raise ExportFailure(f"{where}: {unknown} cannot be expressed as positions") from None
        except ExportFailure as failure:
            raise ExportFailure(f"{where}: {failure}") from None
        except LlmcError as error:
            raise ExportFailure(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
            raise ExportFailure(f"{where}: its arguments do not fit ({type(error).__name__}: {error})") from None
        results = result if isinstance(result, list) else [result]
        if len(results) < len(call.outputs):
            raise ExportFailure(f"{where}: it gives {len(results)} results, {len(call.outputs)} are named")
        self.values.update(zip(call.outputs, results, strict=False))

    def dtype(self, dtype: DType) -> DType:
        """The type in which what the export computes in `dtype` is computed."""
        if dtype is DType.F64:
            raise ExportFailure("64-bit floats are not supported; export the model in float32 or less")
        return self.activation if dtype in (DType.F16, DType.BF16) else dtype

    def value(self, x: Tensor) -> Value:
        """The tensor in the graph; a stored weight in the type in which it is used."""
        if isinstance(x, Value):
            if isinstance(x.op, Param) and x.type.dtype is not self.dtype(x.type.dtype):
                return self.cast(x, self.dtype(x.type.dtype))
            return x
        written = self._written(x)
        return self.expand(written, x.shape) if written.type.shape != x.shape else written

    def cast(self, x: Value, dtype: DType) -> Value:
        """The value in a type."""
        result: Value = x if x.type.dtype is dtype else self.b.cast(x, dtype=dtype)
        return result

    def reshape(self, x: Value, shape: Shape) -> Value:
        """The value in a shape."""
        result: Value = x if x.type.shape == shape else self.b.reshape(x, shape=shape)
        return result

    def expand(self, x: Value, shape: Shape) -> Value:
        """The value broadcast to a shape."""
        result: Value = x if x.type.shape == shape else self.b.expand(x, shape=shape)
        return result

    def _written(self, x: Known) -> Value:
        """The value, which broadcasts to the shape."""
        if isinstance(x, Affine):
            return self._affine(x.line, x.shape, self.dtype(x.dtype))
        if isinstance(x, Condition):
            return self._condition(x)
        condition, chosen, other = x.condition, x.chosen, x.other
        if chosen <= HIDDEN:  # what hides stands where the condition fails
            condition, chosen, other = inverted(condition), other, chosen
        base = self.b.constant(np.asarray(chosen), self.dtype(x.dtype))
        result: Value = self.b.mask(base, self._condition(condition), value=float(other))
        return result

    def _affine(self, line: Line, shape: Shape, dtype: DType) -> Value:
        dtype = DType.I32 if dtype in (DType.I64, DType.I32, DType.I8, DType.U8) else dtype
        total: Value | None = None
        for axis, factor in enumerate(line.coefficients):
            if factor:
                index = self.cast(self._index(shape, axis), dtype)
                index = index if factor == 1 else self.b.mul_scalar(index, value=float(factor))
                total = index if total is None else self.b.add(total, index)
        if total is None:
            made: Value = self.b.constant(np.asarray(line.constant), dtype)
            return made
        if line.constant:
            total = self.b.add_scalar(total, value=float(line.constant))
        return total

    def _index(self, shape: Shape, axis: int) -> Value:
        """The index along one axis, i32: the positions along the tokens, a constant along an axis of fixed size."""
        size = shape[axis]
        column: Shape = tuple(d if i == axis else 1 for i, d in enumerate(shape))
        if isinstance(size, int):
            made: Value = self.b.constant(
                np.arange(size).reshape([int(i == axis) * (size - 1) + 1 for i in range(len(shape))]), DType.I32
            )
            return made
        if size != self.tokens:
            raise Unknown(f"an index along {size} elements")
        return self.reshape(self.positions, column)

    @property
    def positions(self) -> Value:
        """The graph's input of that name."""
        return self.b.input("positions", DType.I32, (self.tokens,))

    def _condition(self, x: Condition) -> Value:
        """Comparisons of positions; the later position, or the one that is moved, stands left."""
        result: Value | None = None
        for line in x.lines:
            left = Line(tuple(max(c, 0) for c in line.coefficients), line.constant)
            right = Line(tuple(max(-c, 0) for c in line.coefficients), 0)
            holds: Value = self.b.greater_equal(
                self._affine(left, x.shape, DType.I32), self._affine(right, x.shape, DType.I32)
            )
            result = holds if result is None else self.b.logical_and(result, holds)
        if result is None:
            made: Value = self.b.constant(np.asarray(not x.never), DType.BOOL)
            return made
        return result


@dataclass
class Operands:
    """One node's arguments, by name or place, in the types that an operator wants."""

    lower: Lowering
    call: Call
    name: str

    @property
    def b(self) -> Builder:
        """The builder."""
        return self.lower.b

    def has(self, name: str) -> bool:
        """Whether the argument is given and is not None."""
        return self.call.arguments.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """An argument: names are followed, lists item by item; the default where it is left out."""
        return self._followed(self.call.arguments.get(name, default))

    def _followed(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._followed(v) for v in value]
        if not isinstance(value, Reference):
            return value
        if value.name not in self.lower.values:
            raise ExportFailure(f"it reads {value.name!r}, which no node before it makes")
        return self.lower.values[value.name]

    def places(self) -> list[Any]:
        """All arguments in order."""
        return [self._followed(v) for v in self.call.positional]

    def tensor(self, name: str) -> Tensor:
        """A tensor."""
        x = self.get(name)
        if not isinstance(x, Value | Affine | Condition | Choice):
            raise ExportFailure(f"{name} must be a tensor, given {str(x)[:80]}")
        return x

    def value(self, name: str) -> Value:
        """A tensor in the graph."""
        return self.lower.value(self.tensor(name))

    def number(self, name: str, default: Number | None = None) -> Number:
        """A number, or a tensor of one number."""
        x = self.get(name, default)
        x = x.number if isinstance(x, Affine | Condition) else x
        if not isinstance(x, int | float):
            raise ExportFailure(f"{name} must be a number, given {str(x)[:80]}")
        return x

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer known now."""
        x = self.get(name, default)
        if type(x) is not int:
            raise ExportFailure(f"{name} must be an integer, given {str(x)[:80]}")
        return x

    def axis(self, name: str, rank: int, default: int | None = None) -> int:
        """An axis, counted from the left."""
        axis = self.integer(name, default)
        if not -rank <= axis < max(rank, 1):
            raise ExportFailure(f"{name} must be an axis of {rank}, given {axis}")
        return axis % rank if rank else 0

    def shape(self, name: str) -> tuple[Dim, ...]:
        """A list of sizes."""
        sizes = self.get(name)
        if not isinstance(sizes, list) or not all(type(s) is int or isinstance(s, Linear) for s in sizes):
            raise ExportFailure(f"{name} must be a list of sizes, given {str(sizes)[:80]}")
        return tuple(sizes)


def shape_of(x: Tensor) -> Shape:
    """A tensor's shape."""
    return x.type.shape if isinstance(x, Value) else x.shape


def dtype_of(x: Tensor) -> DType:
    """A tensor's element type."""
    return x.type.dtype if isinstance(x, Value) else x.dtype


def as_known(x: Any) -> Known | None:
    """What is known of a tensor or number, if anything is."""
    if isinstance(x, Affine | Condition | Choice):
        return x
    if isinstance(x, bool | int | float):
        kind = DType.BOOL if isinstance(x, bool) else DType.I64 if isinstance(x, int) else DType.F32
        return constant(x, (), kind)
    return None


def is_token_ids(x: Tensor) -> bool:
    """Whether a value is an input of the graph in some shape."""
    while isinstance(x, Value) and x.op.name == "reshape":
        x = x.node.inputs[0]
    return isinstance(x, Value) and isinstance(x.op, Input)


def promoted(types: Sequence[DType]) -> DType:
    """The type of a result of operands of these types: floats before integers before flags."""
    order = [DType.BOOL, DType.U8, DType.I8, DType.I32, DType.I64, DType.F8E4M3, DType.F16, DType.BF16, DType.F32]
    return max(types, key=order.index)
