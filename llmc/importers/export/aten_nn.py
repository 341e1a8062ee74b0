"""Operators of neural networks: products with weights, norms, attention; written in primitive ops."""

from __future__ import annotations

import math

from llmc.importers.export.archive import ExportFailure
from llmc.importers.export.aten_math import binary
from llmc.importers.export.aten_shape import viewed
from llmc.importers.export.known import Condition, Line
from llmc.importers.export.lowering import Operands, Tensor, aten, dtype_of
from llmc.ir.op import Value
from llmc.ir.ops.linear import Linear
from llmc.ir.ops.norm import LayerNorm, RmsNorm
from llmc.ir.types import DType

_SMALLEST = 1.1920928955078125e-07
"""The spacing of float32 at 1, which `rms_norm` adds where no eps is given."""


@aten("linear.default")
def linear(o: Operands) -> Tensor:
    """input · weightᵀ + bias, of the last axis."""
    x, weight = o.value("input"), o.tensor("weight")
    if not isinstance(weight, Value):
        raise ExportFailure("its weight is no stored tensor")
    y = Linear().decompose(o.b, x, weight)
    return binary(o, "add", y, o.value("bias")) if o.has("bias") else y


@aten("matmul.default", "mm.default", "bmm.default")
def matmul(o: Operands) -> Value:
    """self · other."""
    result: Value = o.b.matmul(o.value("self"), o.value("other" if o.has("other") else "mat2"))
    return result


@aten("addmm.default", "baddbmm.default")
def addmm(o: Operands) -> Tensor:
    """self + first · second."""
    names = ("mat1", "mat2") if o.name.startswith("addmm") else ("batch1", "batch2")
    if (o.number("alpha", 1), o.number("beta", 1)) != (1, 1):
        raise ExportFailure("alpha and beta must be 1")
    return binary(o, "add", o.b.matmul(*(o.value(n) for n in names)), o.value("self"))


@aten("layer_norm.default", "native_layer_norm.default")
def layer_norm(o: Operands) -> list[Value | None]:
    """The normalisation of the last axis; of `native_layer_norm` only the first result is made."""
    x = o.value("input")
    if list(o.shape("normalized_shape")) != [x.type.shape[-1]]:
        raise ExportFailure(f"it normalises {o.get('normalized_shape')} of {x.type}; supported: the last axis")
    if not o.has("weight"):
        raise ExportFailure("it has no weight; supported: layer_norm with weight, with or without bias")
    weight = o.value("weight")
    wide, eps = o.lower.cast(x, DType.F32), float(o.number("eps", 1e-5))
    vectors = [o.lower.cast(weight, DType.F32)]
    if o.has("bias"):
        y = LayerNorm(eps).decompose(o.b, wide, vectors[0], o.lower.cast(o.value("bias"), DType.F32))
    else:
        centred = o.b.sub(wide, o.b.mean(wide))
        y = RmsNorm(eps).decompose(o.b, centred, vectors[0])
    return [o.lower.cast(y, x.type.dtype), None, None]


@aten("rms_norm.default")
def rms_norm(o: Operands) -> Value:
    """The root-mean-square normalisation of the last axis."""
    x = o.value("input")
    if list(o.shape("normalized_shape")) != [x.type.shape[-1]] or not o.has("weight"):
        raise ExportFailure(f"it must normalise the last axis of {x.type} with a weight")
    eps = float(o.number("eps", _SMALLEST)) if o.has("eps") else _SMALLEST
    wide, weight = o.lower.cast(x, DType.F32), o.lower.cast(o.value("weight"), DType.F32)
    return o.lower.cast(RmsNorm(eps).decompose(o.b, wide, weight), x.type.dtype)


@aten("scaled_dot_product_attention.default")
def attention(o: Operands) -> Tensor:
    """softmax(query · keyᵀ · scale, masked) · value over [..., heads, tokens, width]."""
    q, k, v = (o.value(n) for n in ("query", "key", "value"))
    if float(o.number("dropout_p", 0.0)):
        raise ExportFailure("the model was exported in training mode; call eval() before exporting it")
    if o.get("enable_gqa", False):
        k, v = (_repeated(o, x, q) for x in (k, v))
    width = q.type.shape[-1]
    if not isinstance(width, int):
        raise ExportFailure(f"queries must have a fixed width, given {q.type}")
    scale = float(o.number("scale")) if o.has("scale") else 1 / math.sqrt(width)
    rank = k.type.rank
    turned = o.b.transpose(k, axes=(*range(rank - 2), rank - 1, rank - 2))
    scores: Tensor = o.b.mul_scalar(o.b.matmul(q, turned), value=scale)
    mask = o.tensor("attn_mask") if o.has("attn_mask") else None
    assert isinstance(scores, Value)
    if o.get("is_causal", False):
        rows, columns = scores.type.shape[-2:]
        mask = Condition((rows, columns), (Line((1, -1), 0),))
    if mask is not None and dtype_of(mask) is DType.BOOL:
        scores = o.b.mask(scores, o.lower.value(mask), value=-math.inf)
    elif mask is not None:
        scores = binary(o, "add", scores, mask)
    result: Value = o.b.matmul(o.b.softmax(scores), v)
    return result


def _repeated(o: Operands, x: Value, q: Value) -> Value:
    """Keys or values with each head as often as queries share it."""
    *batch, heads, tokens, width = x.type.shape
    count = q.type.shape[-3]
    if not isinstance(heads, int) or not isinstance(count, int) or count % heads:
        raise ExportFailure(f"{count} query heads cannot share {heads} heads")
    group = count // heads
    single = o.lower.reshape(x, (*batch, heads, 1, tokens, width))
    wide = o.lower.expand(single, (*batch, heads, group, tokens, width))
    repeated = viewed(o, wide, (*batch, count, tokens, width))
    assert isinstance(repeated, Value)
    return repeated
