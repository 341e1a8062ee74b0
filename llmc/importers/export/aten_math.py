"""Operators that compute: elementwise arithmetic, comparisons, choices, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmc.importers.export.archive import ExportFailure
from llmc.importers.export.aten_shape import torch_dtype, viewed
from llmc.importers.export.known import (
    Affine,
    Condition,
    Number,
    Unknown,
    both,
    choice,
    compared,
    computed,
    constant,
    either,
    inverted,
    multiplied,
    spread,
    summed,
)
from llmc.importers.export.lowering import Operands, Tensor, as_known, aten, dtype_of, promoted, shape_of
from llmc.ir.op import Op, Value
from llmc.ir.ops.elementwise import GeluErf, GeluTanh, Silu
from llmc.ir.types import DType, broadcast


@dataclass(frozen=True)
class HiddenScores:
    """Flags about scores, as the safe softmax asks for them: `stage` counts `== -inf`, `not`, `any`, `not`."""

    scores: Value
    stage: int


def binary(o: Operands, name: str, x: Any, y: Any) -> Tensor:
    """x ? y where both are known, by a number where one is, else as two values."""
    left, right = as_known(x), as_known(y)
    if left is not None and right is not None:
        return _known_binary(o, name, x, y)
    if right is not None and right.number is not None and _keeps(x, right):
        return _with_number(o, name, o.lower.value(x), right.number)
    if left is not None and left.number is not None and name in ("add", "mul") and _keeps(y, left):
        return _with_number(o, name, o.lower.value(y), left.number)
    values = [o.lower.value(as_known(v) or v) for v in (x, y)]
    dtype = promoted([v.type.dtype for v in values])
    result: Value = getattr(o.b, name)(*(o.lower.cast(v, dtype) for v in values))
    return result


def _keeps(x: Any, number: Any) -> bool:
    """Whether the number's shape leaves the tensor's as it is."""
    return dtype_of(x).is_float and broadcast(shape_of(x), number.shape) == shape_of(x)


def _known_binary(o: Operands, name: str, x: Any, y: Any) -> Tensor:
    left, right = as_known(x), as_known(y)
    assert left is not None and right is not None
    dtype = _result_type(x, y)
    if name == "add":
        return summed(left, right, 1, dtype)
    if name == "sub":
        return summed(left, right, -1, dtype)
    if name == "mul":
        return multiplied(left, right, dtype)
    if right.number is None or not right.number:
        raise Unknown("a quotient of indices")
    if isinstance(left, Affine) and not left.line.fixed:
        index = o.lower.cast(o.lower.value(left), DType.F32)
        return _with_number(o, "div", index, right.number)
    return computed(lambda a, b: a / b, left, right.number, dtype=dtype if dtype.is_float else DType.F32)


def _result_type(x: Any, y: Any) -> DType:
    """The type of arithmetic: tensors' types promoted; a float number makes integers floats, flags are counted."""
    types = [dtype_of(v) for v in (x, y) if not isinstance(v, int | float)]
    dtype = promoted([DType.I64 if t is DType.BOOL else t for t in types] or [DType.I64])
    return DType.F32 if not dtype.is_float and any(isinstance(v, float) for v in (x, y)) else dtype


def _with_number(o: Operands, name: str, x: Value, number: Number) -> Value:
    value = float(number)
    result: Value
    if name in ("add", "sub"):
        result = o.b.add_scalar(x, value=value if name == "add" else -value)
    elif name == "mul":
        result = o.b.mul_scalar(x, value=value)
    elif value:
        result = o.b.mul_scalar(x, value=1.0 / value)
    else:
        raise ExportFailure("it divides by 0")
    return result


@aten("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "rsub.Scalar", "rsub.Tensor")
def added(o: Operands) -> Tensor:
    """self ± alpha · other."""
    x, y, alpha = o.get("self"), o.get("other"), o.number("alpha", 1)
    if o.name.startswith("rsub"):
        x, y = y, x
    if alpha != 1:
        y = binary(o, "mul", y, alpha)
    if o.name.startswith("rsub") and as_known(x) is not None and as_known(y) is None:
        return binary(o, "add", _with_number(o, "mul", o.lower.value(y), -1.0), x)
    return binary(o, "add" if o.name.startswith("add") else "sub", x, y)


@aten("mul.Tensor", "mul.Scalar")
def product(o: Operands) -> Tensor:
    """self · other."""
    return binary(o, "mul", o.get("self"), o.get("other"))


@aten("div.Tensor", "div.Scalar")
def quotient(o: Operands) -> Tensor:
    """self / other."""
    return binary(o, "div", o.get("self"), o.get("other"))


@aten("pow.Tensor_Scalar", "square.default", "sqrt.default", "reciprocal.default")
def power(o: Operands) -> Value:
    """self ^ exponent."""
    exponent = {"square": 2.0, "sqrt": 0.5, "reciprocal": -1.0}.get(o.name.partition(".")[0])
    exponent = float(o.number("exponent")) if exponent is None else exponent
    result: Value = o.b.pow_scalar(o.value("self"), exponent=exponent)
    return result


def _unary(names: dict[str, str]) -> None:
    for name, op in names.items():

        def handler(o: Operands, op: str = op) -> Tensor:
            x = o.tensor("self")
            if op == "neg" and not isinstance(x, Value):
                return binary(o, "mul", x, -1)
            result: Value = getattr(o.b, op)(o.lower.value(x))
            return result

        aten(f"{name}.default")(handler)


_unary({n: n for n in ("neg", "exp", "rsqrt", "tanh", "sigmoid", "erf", "relu", "cos", "sin")})


@aten("silu.default", "gelu.default")
def activation(o: Operands) -> Value:
    """Activations that are not primitive, in the ops that they are made of."""
    op: Op = Silu()
    if o.name.startswith("gelu"):
        op = GeluTanh() if o.get("approximate", "none") == "tanh" else GeluErf()
    result: Value = op.decompose(o.b, o.value("self"))
    return result


@aten("mean.dim", "sum.dim_IntList")
def reduced(o: Operands) -> Tensor:
    """The mean or sum of the last axis."""
    x = o.value("self")
    axes = [a % x.type.rank for a in o.get("dim")]
    if axes != [x.type.rank - 1]:
        raise ExportFailure(f"it reduces the axes {axes} of {x.type}; supported: the last one")
    y: Value = o.b.mean(x) if o.name.startswith("mean") else o.b.sum(x)
    return y if o.get("keepdim", False) else viewed(o, y, x.type.shape[:-1])


@aten("softmax.int", "_softmax.default", "_safe_softmax.default")
def softmax(o: Operands) -> Tensor:
    """The softmax of the last axis."""
    x = o.value("self")
    if o.axis("dim", x.type.rank) != x.type.rank - 1:
        raise ExportFailure(f"it takes the softmax of another axis than the last of {x.type}")
    number = o.get("dtype")
    if number is not None:
        x = o.lower.cast(x, o.lower.dtype(torch_dtype(number)))
    result: Value = o.b.softmax(x)
    return result


def _comparison(name: str) -> Callable[[Operands], Any]:
    def handler(o: Operands) -> Any:
        x, y = o.get("self"), o.get("other")
        if name == "eq" and isinstance(x, Value) and x.type.dtype.is_float and y == -math.inf:
            return HiddenScores(x, 1)
        left, right = as_known(x), as_known(y)
        if left is None or right is None:
            raise Unknown("a comparison of what the model computes")
        return compared(name, left, right)

    return handler


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    aten(f"{_name}.Tensor", f"{_name}.Scalar")(_comparison(_name))


@aten("any.dim")
def any_along(o: Operands) -> HiddenScores:
    """Whether a row has a score that is not hidden."""
    x = o.get("self")
    if not isinstance(x, HiddenScores) or x.stage != 2 or o.axis("dim", x.scores.type.rank) != x.scores.type.rank - 1:
        raise Unknown("whether any of several flags is set")
    return HiddenScores(x.scores, 3)


@aten("logical_not.default", "bitwise_not.default")
def negated(o: Operands) -> Any:
    """not self."""
    x = o.get("self")
    if isinstance(x, HiddenScores) and x.stage in (1, 3):
        return HiddenScores(x.scores, x.stage + 1)
    return inverted(_condition(o, "self"))


@aten("logical_and.default", "bitwise_and.Tensor", "__and__.Tensor", "__and__.Scalar")
@aten("logical_or.default", "bitwise_or.Tensor", "__or__.Tensor", "__or__.Scalar")
def combined(o: Operands) -> Condition:
    """self and other, self or other."""
    join = both if "and" in o.name.partition(".")[0] else either
    return join(_condition(o, "self"), _condition(o, "other"))


def _condition(o: Operands, name: str) -> Condition:
    x = as_known(o.get(name))
    if x is None:
        raise Unknown("flags that the model computes")
    if isinstance(x, Condition):
        return x
    return compared("ne", x, constant(0, (), DType.I64))


@aten("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
@aten("masked_fill.Scalar", "masked_fill.Tensor", "masked_fill_.Scalar")
def chosen(o: Operands) -> Tensor:
    """self where the condition holds, else other; or `value` where the mask holds, else self."""
    if o.name.startswith("masked"):
        condition, x, y = o.get("mask"), o.get("value"), o.get("self")
    else:
        condition, x, y = o.get("condition"), o.get("self"), o.get("other")
    if isinstance(condition, HiddenScores):
        return _safe(condition, x, y)
    holds = as_known(condition)
    if holds is None:
        raise Unknown("a choice by flags that the model computes")
    if not isinstance(holds, Condition):
        holds = compared("ne", holds, constant(0, (), DType.I64))
    left, right = as_known(x), as_known(y)
    shape = broadcast(broadcast(holds.shape, _shape(x)) or (), _shape(y))
    assert shape is not None
    if holds.number is not None:
        taken, known = (x, left) if holds.number else (y, right)
        return spread(known, shape) if known is not None else o.lower.expand(o.lower.value(taken), shape)
    if left is not None and right is not None:
        if left.number is None or right.number is None:
            raise Unknown("a choice between indices")
        given = [v for v in (x, y) if not isinstance(v, int | float)]
        wide = spread(holds, shape)
        assert isinstance(wide, Condition)
        return choice(wide, left.number, right.number, dtype_of(given[0]) if given else DType.F32)
    if right is not None and right.number is not None:
        return _masked(o, x, holds, right.number)
    if left is not None and left.number is not None:
        return _masked(o, y, inverted(holds), left.number)
    raise Unknown("a choice between two values that the model computes")


def _shape(x: Any) -> Any:
    return () if isinstance(x, int | float) else shape_of(x)


def _masked(o: Operands, x: Tensor, condition: Condition, value: Number) -> Value:
    result: Value = o.b.mask(o.lower.value(x), o.lower.value(condition), value=float(value))
    return result


def _safe(rows: HiddenScores, x: Any, y: Any) -> Tensor:
    """The safe softmax: zeros where a whole row is hidden. Our softmax gives them already."""
    zeros = as_known(x)
    softmax_of_them = isinstance(y, Value) and y.op.name == "softmax" and y.node.inputs[0] == rows.scores
    if rows.stage != 4 or zeros is None or zeros.number != 0 or not softmax_of_them:
        raise Unknown("a choice by flags that the model computes")
    assert isinstance(y, Value)
    return y
