"""Normalisations over the last axis, alone and with the residual addition before them."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.ir.op import Emitter, Op, Value


@dataclass(frozen=True)
class RmsNorm(Op):
    """x / sqrt(mean(x²) + eps) * weight (Zhang and Sennrich, 2019). Operands: x [..., n], weight [n]."""

    eps: float

    stage = "fused"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, weight = values
        scale = b.rsqrt(b.add_scalar(b.mean(b.mul(x, x)), value=self.eps))
        result: Value = b.mul(b.mul(x, scale), weight)
        return result


@dataclass(frozen=True)
class LayerNorm(Op):
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba et al., 2016). Operands: x [..., n], weight, bias [n]."""

    eps: float

    stage = "fused"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, weight, bias = values
        centred = b.sub(x, b.mean(x))
        scale = b.rsqrt(b.add_scalar(b.mean(b.mul(centred, centred)), value=self.eps))
        result: Value = b.add(b.mul(b.mul(centred, scale), weight), bias)
        return result


@dataclass(frozen=True)
class AddRmsNorm(Op):
    """sum = x + residual; rms_norm(sum, weight). Operands: x, residual, weight; results: sum, normal."""

    eps: float

    stage = "fused"
    result_count = 2

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        x, residual, weight = values
        total = b.add(x, residual)
        return total, b.rms_norm(total, weight, eps=self.eps)


@dataclass(frozen=True)
class AddLayerNorm(Op):
    """sum = x + residual; layer_norm(sum, weight, bias). Operands: x, residual, weight, bias; results: sum, normal."""

    eps: float

    stage = "fused"
    result_count = 2

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        x, residual, weight, bias = values
        total = b.add(x, residual)
        return total, b.layer_norm(total, weight, bias, eps=self.eps)


@dataclass(frozen=True)
class NormHeads(Op):
    """The queries and the keys of a joint row normalised: each in pieces of its own width (heads, or all heads as one),
    the rest of the row as it is. Operands: joint [t, n], query weight [query_width], key weight [key_width], and with
    `centred` (a layer norm, else an RMS norm) query bias and key bias; result like joint."""

    eps: float
    queries: int
    query_width: int
    keys: int
    key_width: int
    centred: bool = False

    stage = "fused"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        joint, *vectors = values
        self.expects(len(vectors) == (4 if self.centred else 2), "joint, weights, and biases where centred")
        self.expects(joint.type.rank == 2, "joint [t, n]", joint.type)
        tokens, end = joint.type.shape
        first, second = self.queries * self.query_width, self.keys * self.key_width
        parts = []
        for i, (start, count, width) in enumerate(
            ((0, self.queries, self.query_width), (first, self.keys, self.key_width))
        ):
            flat = b.slice(joint, axis=1, start=start, stop=start + count * width)
            pieces = b.reshape(flat, shape=(tokens, count, width))
            norm = LayerNorm(self.eps) if self.centred else RmsNorm(self.eps)
            parts.append(b.reshape(b(norm, pieces, *vectors[i::2]), shape=(tokens, count * width)))
        if end != first + second:
            parts.append(b.slice(joint, axis=1, start=first + second, stop=end))
        result: Value = b.concat(*parts, axis=1)
        return result
