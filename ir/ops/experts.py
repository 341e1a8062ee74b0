"""A mixture of experts: gated products, of which each token takes a few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmc.ir.op import Cost, Emitter, Op, Value
from llmc.ir.ops.elementwise import ACTIVATIONS
from llmc.ir.ops.linear import in_dtype_of
from llmc.ir.types import TensorType

GATINGS = ("product", "clamped")
"""How gate and up become one, by attribute value."""

GATE_FACTOR = 1.702
"""Of the sigmoid in a clamped gate: x · sigmoid(1.702 · x) is near GELU (Hendrycks and Gimpel, 2016)."""


class Mixture(Op, abstract=True):
    """What ops over experts share: attributes, and the parts of their expansions.

    `gating` "product": activation(gate) · up. "clamped": (up + 1) · gate · sigmoid(1.702 · gate), where gate is at most
    `limit` and up within ± `limit`; its activation is "none". `experts_per_token`: how many weights of a token are not
    zero at most, 0 for all; costs count these experts alone.
    """

    activation: str
    gating: str
    bias: bool
    limit: float
    experts_per_token: int

    stage = "fused"

    def check_gating(self) -> None:
        """The attributes go together."""
        self.expects(self.gating in GATINGS, f"a gating of {', '.join(GATINGS)}", self.gating)
        if self.gating == "product":
            self.expects(self.activation in ACTIVATIONS, "a known activation", self.activation)
            self.expects(self.limit == 0, "no limit where gating is product", self.limit)
        else:
            self.expects(self.activation == "none", "activation none where gating is clamped", self.activation)
            self.expects(0 < self.limit < math.inf, "a limit above 0 where gating is clamped", self.limit)

    def check_tokens(self, x: TensorType, weights: TensorType) -> int:
        """x [t, h] and weights [t, experts]; how many experts there are."""
        self.expects(
            x.rank == weights.rank == 2 and x.shape[0] == weights.shape[0], "x [t, h], weights [t, experts]", x, weights
        )
        experts = weights.shape[1]
        self.expects(
            isinstance(experts, int) and weights.dtype.is_float, "floats for a known number of experts", weights
        )
        assert isinstance(experts, int)
        fits = 0 <= self.experts_per_token <= experts
        self.expects(fits, f"experts_per_token at most {experts}, or 0 for all", self.experts_per_token)
        return experts

    def gated(self, b: Emitter, both: Value) -> Value:
        """[..., 2 · i], gate then up -> [..., i]."""
        axis, width = both.type.rank - 1, both.type.shape[-1]
        assert isinstance(width, int)
        gate = b.slice(both, axis=axis, start=0, stop=width // 2)
        up = b.slice(both, axis=axis, start=width // 2, stop=width)
        result: Value
        if self.gating == "product":
            activation = ACTIVATIONS[self.activation]()
            active = activation.decompose(b, gate) if activation.decomposes else b(activation, gate)
            result = b.mul(active, up)
            return result
        gate = b.clamp(gate, low=-math.inf, high=self.limit)
        up = b.clamp(up, low=-self.limit, high=self.limit)
        active = b.mul(gate, b.sigmoid(b.mul_scalar(gate, value=GATE_FACTOR)))
        result = b.mul(b.add_scalar(up, value=1.0), active)
        return result

    def cost(self, *types: TensorType) -> Cost:
        """The experts that tokens take: for work those of each token, for traffic as many as these can be at most.
        Every step of the expansion is of every expert, so its work is in proportion."""
        whole = super().cost(*types)
        _, experts = types[1].concrete({})
        each = self.experts_per_token or experts
        return Cost(whole.flops * each // experts, self.bytes_read(types), whole.bytes_written)

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        tokens, experts = operands[1].concrete({})
        touched = min(experts, tokens * (self.experts_per_token or experts))
        return sum(t.bytes for t in operands[:2]) + self.parameter_bytes(operands) * touched // experts

    def parameter_bytes(self, operands: Sequence[TensorType]) -> int:
        """Bytes of all experts' weights and biases."""
        return sum(t.bytes for t in operands[2:])


@dataclass(frozen=True)
class Experts(Mixture):
    """The sum over experts e of weights[:, e] · down_e(gated(gate_e(x), up_e(x))), see `Mixture`.

    Operands: x [t, h]; weights [t, experts], zero for experts that a token does not take; gate_up [experts, 2 · i, h]
    in its storage dtype, i rows of gate, then i of up; down [experts, h, i]; gate_up_bias [experts, 2 · i] and
    down_bias [experts, h] if `bias`. Result like x.
    """

    activation: str
    gating: str = "product"
    bias: bool = False
    limit: float = 0.0
    experts_per_token: int = 0

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.check_gating()
        operands = "x, weights, gate_up, down" + ", gate_up_bias, down_bias" * self.bias
        self.expects(len(types) == 4 + 2 * self.bias, operands, *types)
        x, weights, gate_up, down, *biases = types
        experts = self.check_tokens(x, weights)
        hidden = x.shape[1]
        self.expects(
            gate_up.rank == 3 and gate_up.shape[::2] == (experts, hidden), "gate_up [experts, 2 * i, h]", *types
        )
        rows = gate_up.shape[1]
        self.expects(isinstance(rows, int) and rows % 2 == 0, "an even number of rows of gate and up", gate_up)
        assert isinstance(rows, int)
        self.expects(down.shape == (experts, hidden, rows // 2), f"down [experts, h, {rows // 2}]", *types)
        shapes = [(experts, rows), (experts, hidden)] if self.bias else []
        self.expects(
            [b.shape for b in biases] == shapes, "gate_up_bias [experts, 2 * i], down_bias [experts, h]", *types
        )
        return (x,)

    def decompose(self, b: Emitter, *values: Value) -> Value:
        x, weights, gate_up, down, *biases = values
        inner = self.gated(b, products(b, x, gate_up, *biases[:1]))
        return weighted_sum(b, weights, products(b, inner, down, *biases[1:]))


def products(b: Emitter, x: Value, weight: Value, *bias: Value) -> Value:
    """x [m, k] or [experts, m, k] with each expert's weight [experts, n, k], plus its bias [experts, n]: [experts, m,
    n]."""
    y: Value = b.matmul(x, b.transpose(in_dtype_of(b, weight, x), axes=(0, 2, 1)))
    if bias:
        experts, rows = bias[0].type.shape
        y = b.add(y, b.reshape(in_dtype_of(b, bias[0], x), shape=(experts, 1, rows)))
    return y


def weighted_sum(b: Emitter, weights: Value, y: Value) -> Value:
    """weights [t, experts], y [experts, t, h] -> [t, h], one product for each token."""
    tokens, experts = weights.type.shape
    rows = b.reshape(in_dtype_of(b, weights, y), shape=(tokens, 1, experts))
    result: Value = b.reshape(b.matmul(rows, b.transpose(y, axes=(1, 0, 2))), shape=(tokens, y.type.shape[2]))
    return result
