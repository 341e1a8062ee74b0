"""Operators that make indices and tensors of one number, or look up rows of what is stored."""

from __future__ import annotations

import math

from llmc.importers.export.archive import ExportFailure
from llmc.importers.export.aten_shape import torch_dtype
from llmc.importers.export.known import (
    Affine,
    Known,
    Line,
    Number,
    Unknown,
    constant,
    gathered,
    iota,
    joined,
    running_sum,
    sliced,
    summed,
    triangle,
)
from llmc.importers.export.lowering import Operands, Tensor, as_known, aten, dtype_of, shape_of
from llmc.ir.graph import Param
from llmc.ir.op import Value
from llmc.ir.types import DType, Shape


@aten("diff.default")
def diff(o: Operands) -> Tensor:
    """Differences of neighbours along an axis."""
    x = as_known(o.tensor("self"))
    if x is None or o.integer("n", 1) != 1 or o.has("append"):
        raise Unknown("differences of what are no indices")
    axis = o.axis("dim", len(x.shape), -1)
    before = as_known(o.get("prepend"))
    if before is not None:
        x = joined([before, x], axis)
    size = x.shape[axis]
    first, second = (sliced(x, axis, start, 1, size - 1) for start in (0, 1))
    return summed(second, first, -1, x.dtype)


@aten("arange.default", "arange.start", "arange.start_step")
def arange(o: Operands) -> Tensor:
    """start, start + step, ... below end."""
    start, end, step = o.get("start", 0), o.get("end"), o.get("step", 1)
    number = o.get("dtype")
    dtype = DType.I64 if number is None else torch_dtype(number)
    if not isinstance(start, int) or not isinstance(step, int) or step < 1:
        raise Unknown(f"a range from {start} in steps of {step}")
    size = end - start if step == 1 else -(-(end - start) // step)
    return iota(size, dtype, start, step)


@aten("zeros.default", "ones.default", "full.default", "scalar_tensor.default", "new_zeros.default")
@aten("new_ones.default", "new_full.default", "zeros_like.default", "ones_like.default", "full_like.default")
def filled(o: Operands) -> Known:
    """A tensor of one number."""
    like = o.tensor("self") if o.has("self") else None
    kind = o.name.partition(".")[0].removeprefix("new_").removesuffix("_like")
    shape: Shape = shape_of(like) if like is not None and not o.has("size") else ()
    if kind in ("zeros", "ones"):
        value: Number = int(kind == "ones")
        dtype = DType.F32
    else:
        value = o.number("s" if kind == "scalar_tensor" else "fill_value")
        whole = DType.BOOL if isinstance(value, bool) else DType.I64
        dtype = whole if isinstance(value, int) and kind == "full" else DType.F32
    if o.has("size"):
        shape = o.shape("size")
    if like is not None:
        dtype = dtype_of(like)
    if o.has("dtype"):
        dtype = torch_dtype(o.get("dtype"))
    return constant(value, shape, o.lower.dtype(dtype) if dtype.is_float else dtype)


@aten("tril.default", "triu.default")
def triangular(o: Operands) -> Known:
    """One side of a matrix of one number, 0 on the other."""
    x = as_known(o.tensor("self"))
    if x is None:
        raise Unknown("a triangle of what is not one number")
    return triangle(x, o.integer("diagonal", 0), o.name.startswith("triu"))


@aten("cumsum.default")
def cumsum(o: Operands) -> Known:
    """A running sum of one number."""
    x = as_known(o.tensor("self"))
    if x is None:
        raise Unknown("a running sum of what is not one number")
    return running_sum(x, o.axis("dim", len(x.shape)))


@aten("index.Tensor", "index_select.default", "embedding.default")
def looked_up(o: Operands) -> Tensor:
    """Elements at indices: of what is known, or rows of a table at token ids or positions."""
    if o.name == "index.Tensor":
        x, indices = o.tensor("self"), o.get("indices")
    elif o.name == "embedding.default":
        x, indices = o.tensor("weight"), [o.tensor("indices")]
    else:
        x, indices = o.tensor("self"), [o.tensor("index")]
        if o.axis("dim", len(shape_of(x))) != 0:
            raise ExportFailure("it selects along another axis than the first")
    if not isinstance(x, Value):
        if any(as_known(i) is None for i in indices):
            raise Unknown("a gather by token ids")
        return gathered(x, [i for i in indices if isinstance(i, Affine)])
    if len(indices) != 1 or x.type.rank != 2 or not isinstance(x.op, Param):
        raise ExportFailure(f"it gathers from {x.type}; supported: rows of a stored matrix")
    (index,) = indices
    rows, width = x.type.shape
    shape = shape_of(index)
    if math.prod(d for d in shape if isinstance(d, int)) != 1:
        raise ExportFailure(f"it looks up {list(map(str, shape))} rows; expected one for each token")
    if isinstance(index, Affine):
        line = Line(
            tuple(c for c, d in zip(index.line.coefficients, shape, strict=True) if d != 1), index.line.constant
        )
        if line.coefficients != (1,) or not isinstance(rows, int):
            raise Unknown("a look-up by what are no positions")
        o.lower.tables.append(rows - int(line.constant))
    ids = o.lower.reshape(o.lower.value(index), (o.lower.tokens,))
    found: Value = o.b.embedding(ids, x, dtype=o.lower.dtype(x.type.dtype))
    return o.lower.reshape(found, (*shape, width))
