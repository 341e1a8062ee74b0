"""A mixture of experts in ops that have kernels: rows grouped by expert, a product of each expert's rows, their sum."""

from __future__ import annotations

from llmc.backends.tvm.expert_ops import (
    CombineExperts,
    PackedExpertsGatedLinear,
    PackedExpertsLinear,
    TiledExpertsGatedLinear,
    TiledExpertsLinear,
)
from llmc.ir.op import Emitter, Value
from llmc.ir.ops.experts import Experts
from llmc.ir.ops.quantized_experts import QuantizedExperts
from llmc.ir.types import DType


def lower_experts(b: Emitter, op: Experts, inputs: tuple[Value, ...]) -> Value:
    """With weights as they are stored, in panels; a bias f32."""
    x, weights, gate_up, down, *biases = inputs
    _, hidden, inner = down.type.concrete({})
    rows, starts, places, shares = b.group_rows(x, weights, per_token=_per_token(op, weights))
    first = PackedExpertsGatedLinear(inner, op.activation, op.gating, op.bias, op.limit)
    middle = b.one(first, rows, starts, b.pack_gated(gate_up), *_gated_bias(b, biases[:1]))
    second = PackedExpertsLinear(hidden, op.bias)
    y = b.one(second, middle, starts, b.pack_panels(down), *(_float(b, v) for v in biases[1:]))
    return b.one(CombineExperts(), y, places, shares)


def lower_quantized_experts(
    b: Emitter, op: QuantizedExperts, tiles: tuple[Value, ...], inputs: tuple[Value, ...]
) -> Value:
    """With codes and scales in panels; `tiles` are the activations, quantized."""
    x, weights = inputs[:2]
    experts, hidden = weights.type.shape[1], x.type.shape[1]
    assert isinstance(experts, int) and isinstance(hidden, int)
    gate_up, gate_up_scales, down, down_scales = (_by_expert(b, v, experts) for v in inputs[2:6])
    biases = list(inputs[6:])
    inner = gate_up.type.concrete({})[1] // 2
    bits, each = op.quant.bits, _per_token(op, weights)
    *rows, starts, places, shares = b.group_tiles(*tiles, weights, per_token=each)
    gated = TiledExpertsGatedLinear(op.format, inner, hidden, each, op.activation, op.gating, op.bias, op.limit)
    codes = b.pack_codes(b.interleave_gated(gate_up), bits=bits), b.pack_panels(b.interleave_gated(gate_up_scales))
    middle = b(gated, *rows, starts, *codes, *_gated_bias(b, biases[:1]))
    linear = TiledExpertsLinear(op.format, hidden, inner, each, op.bias)
    codes = b.pack_codes(down, bits=bits), b.pack_panels(down_scales)
    y = b.one(linear, *middle, starts, *codes, *(_float(b, v) for v in biases[1:]))
    return b.one(CombineExperts(), y, places, shares)


def _per_token(op: Experts | QuantizedExperts, weights: Value) -> int:
    experts = weights.type.shape[1]
    assert isinstance(experts, int)
    return op.experts_per_token or experts


def _by_expert(b: Emitter, matrix: Value, experts: int) -> Value:
    """[experts · n, k] as [experts, n, k]."""
    rows, width = matrix.type.concrete({})
    result: Value = b.reshape(matrix, shape=(experts, rows // experts, width))
    return result


def _gated_bias(b: Emitter, bias: list[Value]) -> list[Value]:
    """A bias [experts, 2 · n], if there is one, in gated panels of one column."""
    return [b.pack_gated(b.reshape(_float(b, v), shape=(*v.type.shape, 1))) for v in bias]


def _float(b: Emitter, value: Value) -> Value:
    result: Value = value if value.type.dtype is DType.F32 else b.cast(value, dtype=DType.F32)
    return result
