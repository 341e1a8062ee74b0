"""Examples of the ops of a mixture of experts."""

from __future__ import annotations

import numpy as np

from llmc.ir.op import Array
from llmc.ir.ops.experts import Experts
from llmc.ir.ops.quantized_experts import QuantizedExperts
from llmc.ir.ops.routing import Routing, TopK
from tests.ir.example import Example, T, f, silu
from tests.ir.quantized_examples import dequantized, fake, weight_types


def route(
    scores: Array, choice: Array, k: int, groups: int = 1, top_groups: int = 1, best: int = 1, whole: bool = False
) -> Array:
    """Token by token: the k best experts of the best groups. `whole`: weights are divided by their sum."""
    out = np.zeros_like(scores)
    size = scores.shape[1] // groups
    for t, row in enumerate(choice):
        strength = [sum(sorted(row[g * size : g * size + size])[-best:]) for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g: -strength[g])[:top_groups]
        experts = [e for g in sorted(allowed) for e in range(g * size, g * size + size)]
        chosen = sorted(experts, key=lambda e: -row[e])[:k]
        out[t, chosen] = scores[t, chosen] / (scores[t, chosen].sum() if whole else 1)
    return out


def softmax(x: Array) -> Array:
    e: Array = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    result: Array = 1 / (1 + np.exp(-x))
    return result


def mix(x: Array, weights: Array, gate_up: Array, down: Array, *biases: Array) -> Array:
    """Token by token, expert by expert, with SiLU."""
    out = np.zeros_like(x)
    for t, e in np.ndindex(weights.shape):
        both = gate_up[e] @ x[t] + (biases[0][e] if biases else 0)
        gate, up = np.split(both, 2)
        out[t] += weights[t, e] * (down[e] @ (silu(gate) * up) + (biases[1][e] if biases else 0))
    return out


def mix_clamped(x: Array, weights: Array, gate_up: Array, down: Array, gate_up_bias: Array, down_bias: Array) -> Array:
    """The same with clamped gates; the limit is 0.75."""
    out = np.zeros_like(x)
    for t, e in np.ndindex(weights.shape):
        gate, up = np.split(gate_up[e] @ x[t] + gate_up_bias[e], 2)
        gate, up = np.minimum(gate, 0.75), np.maximum(np.minimum(up, 0.75), -0.75)
        out[t] += weights[t, e] * (down[e] @ ((up + 1) * gate / (1 + np.exp(-1.702 * gate))) + down_bias[e])
    return out


def mix_quantized(x: Array, weights: Array, *codes: Array) -> Array:
    """3 experts of width 33 and 32 inside, of 4-bit codes."""
    gate_up = dequantized(codes[0], codes[1], 8, x.shape[1]).reshape(3, 64, -1)
    down = dequantized(codes[2], codes[3], 8, 32).reshape(3, x.shape[1], 32)
    out = np.zeros_like(x)
    for t, e in np.ndindex(weights.shape):
        gate, up = np.split(gate_up[e] @ fake(x[t : t + 1])[0], 2)
        out[t] += weights[t, e] * (down[e] @ fake((silu(gate) * up)[None])[0])
    return out


LOGITS = np.random.default_rng(11).permutation(5 * 6).reshape(5, 6) / 7.0 - 2
BIAS = np.array([0.3, -0.2, 0.1, 0.0, 0.4, -0.5])
TIED = np.array([[1.0, 3.0, 3.0, 3.0], [-np.inf, 0.0, np.nan, 1.0], [5.0, 5.0, 5.0, 5.0]])
_RNG = np.random.default_rng(12)
ROUTED = np.where(_RNG.random((5, 3)) < 0.6, _RNG.random((5, 3)), 0)
CODES = [_RNG.integers(0, 16, shape) for shape in ((3 * 64, 64), (3 * 33, 32))]

EXPERT_EXAMPLES = [
    Example(
        TopK(2),
        (f(3, 4),),
        lambda x: np.array([[0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], bool),
        {0: TIED},
    ),
    Example(TopK(6), (f(T, 6),), lambda x: np.ones(x.shape, bool)),
    Example(Routing(2, "softmax", True, 1.0), (f(T, 6),), lambda x: route(softmax(x), x, 2, whole=True), {0: LOGITS}),
    Example(Routing(3, "softmax", False, 2.5), (f(T, 6),), lambda x: 2.5 * route(softmax(x), x, 3), {0: LOGITS}),
    Example(
        Routing(2, "softmax", False, 1.0, 3, 1),
        (f(T, 6),),
        lambda x: route(softmax(x), x, 2, 3, 1),
        {0: LOGITS},
    ),
    Example(
        Routing(3, "sigmoid", True, 1.5, 2, 1, "top2", True),
        (f(T, 6), f(6)),
        lambda x, b: 1.5 * route(sigmoid(x), sigmoid(x) + b, 3, 2, 1, 2, True),
        {0: LOGITS, 1: BIAS},
    ),
    Example(Experts("silu"), (f(T, 4), f(T, 3), f(3, 6, 4), f(3, 4, 3)), mix, {1: ROUTED}),
    Example(
        Experts("silu", bias=True),
        (f(T, 4), f(T, 3), f(3, 6, 4), f(3, 4, 3), f(3, 6), f(3, 4)),
        mix,
        {1: ROUTED},
    ),
    Example(
        Experts("none", "clamped", True, 0.75),
        (f(T, 4), f(T, 3), f(3, 6, 4), f(3, 4, 3), f(3, 6), f(3, 4)),
        mix_clamped,
        {1: ROUTED},
    ),
    Example(
        QuantizedExperts("q4", "silu"),
        (f(T, 33), f(T, 3), *weight_types(192, 2), *weight_types(99, 1)),
        mix_quantized,
        {1: ROUTED, 2: CODES[0], 4: CODES[1]},
    ),
]
