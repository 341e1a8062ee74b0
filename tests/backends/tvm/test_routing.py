"""The routing kernel: against float64, bit for bit whatever a token is batched with, ties, and what is no number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.backends.tvm.isa import Isa
from llmc.backends.tvm.kernels.routing import routing
from llmc.ir.ops.routing import Routing
from llmc.ir.types import DType, TensorType
from tests.backends.tvm.machine import Array, Guarded, Kernel, f64, same_bits
from tests.backends.tvm.mixtures import every_isa
from tests.tolerance import assert_as_good_as

ROUTINGS = [
    Routing(2, "softmax", True, 1.0),
    Routing(3, "softmax", False, 2.5),
    Routing(3, "softmax", False, 16.0, 3, 2),
    Routing(2, "softmax", True, 1.0, bias=True),
    Routing(1, "sigmoid", False, 1.0),
    Routing(4, "sigmoid", True, 2.5, 3, 2, "top2", True),
    Routing(2, "sigmoid", True, 2.5, 3, 1),
]


def route(isa: Isa, op: Routing, logits: Array, bias: Array, tasks: int) -> Array:
    names = ("k", "scoring", "normalise", "scale", "groups", "top_groups", "group_score", "bias")
    kernel = Kernel(routing, isa, rows_dim=0, experts=logits.shape[1], **{n: getattr(op, n) for n in names})
    y = Guarded(logits.shape, np.float32)
    kernel([len(logits)], [logits, *([bias] if op.bias else []), y], tasks)
    return y.array


def oracle(op: Routing, logits: Array, bias: Array, dtype: Any) -> Array:
    """Row by row, in float32 for the naive result, in float64 for the truth."""
    x = logits.astype(dtype)
    if op.scoring == "softmax":
        e = np.exp(x - x.max(1, keepdims=True))
        scores = e / e.sum(1, keepdims=True, dtype=dtype)
    else:
        scores = dtype(1) / (dtype(1) + np.exp(-x))
    choice = f64(logits) if op.scoring == "softmax" and not op.bias else f64(scores) + (f64(bias) if op.bias else 0)
    size = x.shape[1] // op.groups
    out = np.zeros_like(x)
    for row, c in enumerate(choice):
        best = {"max": 1, "top2": 2}[op.group_score]
        strength = [np.sort(c[g * size : g * size + size])[-best:].sum() for g in range(op.groups)]
        allowed = np.repeat(np.isin(np.arange(op.groups), np.argsort(strength)[::-1][: op.top_groups]), size)
        chosen = np.argsort(np.where(allowed, -c, np.inf), kind="stable")[: op.k]
        out[row, chosen] = scores[row, chosen]
        if op.normalise:
            out[row] /= out[row].sum(dtype=dtype)
    return np.asarray(out * dtype(op.scale))


@every_isa
@pytest.mark.parametrize("op", ROUTINGS, ids=str)
@pytest.mark.parametrize("experts", [6, 9, 60])
def test_routing(isa: Isa, op: Routing, experts: int) -> None:
    rng = np.random.default_rng(experts)
    logits = (rng.standard_normal((2000 // op.k, experts)) * 2).astype(np.float32)  # 2,000 weights that are not zero
    bias = (rng.standard_normal(experts) * 0.2).astype(np.float32)
    y = route(isa, op, logits, bias, 3)
    truth = oracle(op, logits, bias, np.float64)
    assert ((y != 0) == (truth != 0)).all()
    assert_as_good_as(y, oracle(op, logits, bias, np.float32), truth)
    types = [TensorType(DType.F32, a.shape) for a in (logits, bias)][: 1 + op.bias]
    (reference,) = op.evaluate(types, [f64(logits), f64(bias)][: 1 + op.bias], {})
    np.testing.assert_allclose(reference, truth, rtol=1e-12)
    for tasks in (1, 2, 4):
        assert same_bits(route(isa, op, logits, bias, tasks), y)
    assert same_bits(route(isa, op, logits[-1:], bias, 1)[0], y[-1])


@every_isa
def test_routing_of_ties_and_of_what_is_no_number(isa: Isa) -> None:
    logits = np.array(
        [
            [1.0, 3.0, 3.0, 3.0, 0.0],
            [0.0, np.nan, 1.0, 2.0, 3.0],
            [-np.inf, -np.inf, 5.0, -np.inf, -np.inf],
            [-0.0, 0.0, -0.0, 0.0, -0.0],
        ],
        np.float32,
    )
    y = route(isa, Routing(2, "softmax", True, 1.0), logits, logits[0], 1)
    assert np.flatnonzero(y[0]).tolist() == [1, 2]
    assert y[0, 1] == y[0, 2] == 0.5
    assert np.isnan(y[1]).any(), "a NaN would be lost"
    assert y[2].tolist() == [0, 0, 1, 0, 0]
    assert y[3].tolist() == [0.5, 0.5, 0, 0, 0]
    sigmoid = route(isa, Routing(2, "sigmoid", True, 1.0), np.full((1, 5), -2000, np.float32), logits[0], 1)
    assert (sigmoid == 0).all(), "weights of nothing are nothing"
