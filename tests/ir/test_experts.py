"""What the ops of a mixture of experts refuse, cost and choose."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmc.ir.errors import TypeMismatch
from llmc.ir.op import Op
from llmc.ir.ops.elementwise import Clamp
from llmc.ir.ops.experts import Experts
from llmc.ir.ops.quantized_experts import QuantizedExperts
from llmc.ir.ops.routing import Routing, TopK
from llmc.ir.types import DType, TensorType
from tests.ir.example import T, f, i
from tests.ir.quantized_examples import weight_types

MIXTURE = (f(T, 4), f(T, 3), f(3, 6, 4), f(3, 4, 3))
BIASED = (*MIXTURE, f(3, 6), f(3, 4))


@pytest.mark.parametrize(
    ("op", "types", "message"),
    [
        (TopK(5), (f(T, 4),), r"^top_k\{k=5\}: expected k from 1 to the size of the last axis"),
        (TopK(0), (f(T, 4),), "expected k from 1 to the size"),
        (Clamp(1.0, 0.0), (f(T),), "expected low at most high; given 1.0, 0.0"),
        (Routing(2, "tanh", True, 1.0), (f(T, 6),), "expected a scoring of softmax, sigmoid; given tanh"),
        (
            Routing(2, "softmax", True, 1.0, group_score="mean"),
            (f(T, 6),),
            "expected a group_score of max, top2; given mean",
        ),
        (Routing(2, "softmax", True, 1.0), (f(T, 6), f(6)), r"expected logits f32 \[t, experts\]; given"),
        (Routing(2, "softmax", True, 1.0, bias=True), (f(T, 6), f(5)), r"and bias f32 \[experts\]; given"),
        (Routing(2, "softmax", True, 1.0), (TensorType(DType.F16, (T, 6)),), "expected logits f32"),
        (Routing(2, "softmax", True, 1.0, 4, 1), (f(T, 6),), "a number of groups that divides 6 experts; given 4"),
        (Routing(2, "softmax", True, 1.0, 3, 4), (f(T, 6),), "expected top_groups from 1 to 3; given 4"),
        (Routing(3, "softmax", True, 1.0, 3, 1), (f(T, 6),), "k from 1 to the 2 experts that may be chosen; given 3"),
        (Routing(1, "softmax", True, 1.0, 6, 1, "top2"), (f(T, 6),), "groups of at least 2 experts for top2; given 1"),
        (Experts("silu", "sum"), MIXTURE, "expected a gating of product, clamped; given sum"),
        (Experts("swosh"), MIXTURE, "expected a known activation; given swosh"),
        (Experts("silu", limit=7.0), MIXTURE, "expected no limit where gating is product; given 7.0"),
        (
            Experts("silu", "clamped", limit=7.0),
            MIXTURE,
            "expected activation none where gating is clamped; given silu",
        ),
        (Experts("none", "clamped"), MIXTURE, "expected a limit above 0 where gating is clamped; given 0.0"),
        (Experts("silu"), BIASED, "expected x, weights, gate_up, down; given"),
        (Experts("silu"), (f(T, 4), f(3), *MIXTURE[2:]), r"expected x \[t, h\], weights \[t, experts\]"),
        (Experts("silu"), (f(T, 4), i(T, 3), *MIXTURE[2:]), "expected floats for a known number of experts"),
        (Experts("silu", experts_per_token=4), MIXTURE, "experts_per_token at most 3, or 0 for all; given 4"),
        (Experts("silu"), (*MIXTURE[:2], f(3, 6, 5), MIXTURE[3]), r"expected gate_up \[experts, 2 \* i, h\]"),
        (Experts("silu"), (*MIXTURE[:2], f(3, 5, 4), MIXTURE[3]), "expected an even number of rows of gate and up"),
        (Experts("silu"), (*MIXTURE[:3], f(3, 4, 6)), r"expected down \[experts, h, 3\]"),
        (Experts("silu", bias=True), (*MIXTURE, f(3, 3), f(3, 4)), r"expected gate_up_bias \[experts, 2 \* i\]"),
        (
            QuantizedExperts("fp8", "silu"),
            (f(T, 128), f(T, 3), *weight_types(6, 1, 128), *weight_types(3, 1, 128)),
            "a format for activations in 8 bits, q8, q4; given fp8",
        ),
        (
            QuantizedExperts("q4", "silu"),
            (f(T, 32), f(T, 3), *weight_types(10, 1), *weight_types(96, 1)),
            r"expected gate_up \[experts \* 2 \* i, h\]",
        ),
        (
            QuantizedExperts("q4", "silu"),
            (f(T, 32), f(T, 3), *weight_types(12, 1), *weight_types(95, 1)),
            r"expected down \[3 \* 32, i\]",
        ),
        (
            QuantizedExperts("q4", "silu"),
            (f(T, 40), f(T, 3), *weight_types(12, 1), *weight_types(120, 1)),
            r"expected codes \[n, 64\]",
        ),
    ],
    ids=lambda v: v.name if isinstance(v, Op) else "",
)
def test_what_inference_refuses(op: Op, types: tuple[TensorType, ...], message: str) -> None:
    with pytest.raises(TypeMismatch, match=message):
        op.infer(*types)


def test_costs_are_those_of_the_experts_that_tokens_take() -> None:
    weights = f(8, 6, 4), f(8, 4, 3)
    stored = sum(t.bytes for t in weights)
    for tokens, experts in ((1, 2), (3, 6), (4, 8), (100, 8)):
        types = (f(tokens, 4), f(tokens, 8), *weights)
        some, all_ = (Experts("silu", experts_per_token=k).cost(*types) for k in (2, 0))
        assert some.bytes_read == sum(t.bytes for t in types[:2]) + stored * experts // 8
        assert some.flops * 4 == all_.flops > tokens * 8 * 2 * (6 * 4 + 4 * 3)
        assert all_.bytes_read == sum(t.bytes for t in types)


def test_quantized_experts_cost_their_true_bits() -> None:
    codes = *weight_types(8 * 64, 1), *weight_types(8 * 32, 1)
    types = (f(1, 32), f(1, 8), *codes)
    cost = QuantizedExperts("q4", "silu", experts_per_token=2).cost(*types)
    assert cost.bytes_read == 32 * 4 + 8 * 4 + 2 * (64 + 32) * (16 + 2)


def test_weights_of_nothing_are_nothing() -> None:
    """All scores underflow; their sum is no divisor."""
    logits = np.full((1, 4), -2000.0)
    (weights,) = Routing(2, "sigmoid", True, 1.0).evaluate((f(1, 4),), (logits,), {})
    assert (weights == 0).all()


def test_a_logit_that_is_no_number_stays_one() -> None:
    logits = np.array([[0.0, math.nan, 1.0, 2.0]])
    for scoring in ("softmax", "sigmoid"):
        (weights,) = Routing(2, scoring, False, 1.0).evaluate((f(1, 4),), (logits,), {})
        assert np.isnan(weights).any()
