"""A mixture of experts whose weights are codes and scales, with activations in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmc.ir.op import Emitter, Value
from llmc.ir.ops.experts import Mixture, products, weighted_sum
from llmc.ir.ops.quantized import Quantized, weight_bytes
from llmc.ir.quant import INTEGER_FORMATS
from llmc.ir.types import DType, TensorType


@dataclass(frozen=True)
class QuantizedExperts(Mixture, Quantized):
    """`experts` of weights in a format, with activations in 8 bits before both products.

    Operands: x f32 [t, h]; weights f32 [t, experts]; codes and scales of gate_up as one matrix [experts · 2 · i, h],
    then those of down as [experts · h, i]; gate_up_bias [experts, 2 · i] and down_bias [experts, h] if `bias`.
    """

    format: str
    activation: str
    gating: str = "product"
    bias: bool = False
    limit: float = 0.0
    experts_per_token: int = 0

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.check_gating()
        integers = ", ".join(INTEGER_FORMATS)
        self.expects(self.quant.integer_products, f"a format for activations in 8 bits, {integers}", self.format)
        operands = "x, weights, codes and scales of gate_up and down" + ", gate_up_bias, down_bias" * self.bias
        self.expects(len(types) == 6 + 2 * self.bias, operands, *types)
        x, weights, *codes = types[:6]
        experts = self.check_tokens(x, weights)
        self.expects(x.dtype is DType.F32 and isinstance(x.shape[1], int), "x f32 [t, h] of a known width", x)
        self.check_weight(x.shape[1], codes[:2])
        rows, hidden = codes[0].shape[0], x.shape[1]
        assert isinstance(hidden, int)
        self.expects(isinstance(rows, int) and rows % (2 * experts) == 0, "gate_up [experts * 2 * i, h]", *types)
        assert isinstance(rows, int)
        inner = rows // (2 * experts)
        self.check_weight(inner, codes[2:])
        self.expects(codes[2].shape[0] == experts * hidden, f"down [{experts} * {hidden}, i]", *types)
        shapes = [(experts, 2 * inner), (experts, hidden)] if self.bias else []
        given = [t.shape for t in types[6:]]
        self.expects(given == shapes, "gate_up_bias [experts, 2 * i], down_bias [experts, h]", *types)
        return (x,)

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, weights, *codes = values[:6]
        biases = values[6:]
        tokens, experts = weights.type.shape
        assert isinstance(experts, int)
        both = products(b, self._rounded(b, x), self._weight(b, experts, *codes[:2], x.type.shape[1]), *biases[:1])
        inner = self.gated(b, both)
        width = inner.type.shape[2]
        rows = self._rounded(b, b.reshape(inner, shape=(tokens * experts, width)))
        inner = b.reshape(rows, shape=(experts, tokens, width))
        return weighted_sum(b, weights, products(b, inner, self._weight(b, experts, *codes[2:], width), *biases[1:]))

    def _rounded(self, b: Emitter, x: Value) -> Value:
        """Activations as their codes say."""
        result: Value = b.dequantize_rows(*b.quantize_rows(x, group=self.quant.group), width=x.type.shape[1])
        return result

    def _weight(self, b: Emitter, experts: int, codes: Value, scales: Value, width: object) -> Value:
        """[experts, n, width], as the codes say."""
        whole = b.dequantize_weight(codes, scales, format=self.format, width=width)
        result: Value = b.reshape(whole, shape=(experts, whole.type.shape[0] // experts, width))
        return result

    def parameter_bytes(self, operands: Sequence[TensorType]) -> int:
        weights = sum(weight_bytes(self.quant, *operands[i : i + 2]) for i in (2, 4))
        return weights + sum(t.bytes for t in operands[6:])
