"""Routing and experts are found behind all their attributes, and nothing that only looks like them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from llmc.ir.graph import Graph
from llmc.ir.op import Value
from llmc.ir.ops.experts import Experts
from llmc.ir.ops.routing import Routing
from llmc.ir.text import parse
from llmc.ir.types import DType
from llmc.passes.base import PassContext
from llmc.passes.observe import NumericsCheck
from llmc.passes.pipelines import COMMON, model_pipeline, read_pipeline
from llmc.passes.quantize import INT8, KEPT, Quantize
from tests.passes.experts import CLAMPED, GROUPED, PLAIN, SILU, fused, mixture, mixture_graph
from tests.passes.graphs import F32, Model, counts

FUSE = "raise-linear,fuse-mlp,fuse-experts,canonicalize"


@pytest.mark.parametrize(
    "routing",
    [
        PLAIN,
        Routing(2, "softmax", False, 1.0),
        Routing(2, "softmax", False, 16.0, 3, 2),
        Routing(1, "sigmoid", False, 2.5),
        Routing(2, "softmax", True, 1.0, bias=True),
        GROUPED,
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize(
    "op", [SILU, Experts("relu"), Experts("gelu_tanh"), replace(SILU, bias=True), CLAMPED], ids=str
)
def test_what_becomes_routing_and_experts(routing: Routing, op: Experts) -> None:
    for weights in (F32, DType.BF16):
        for pipeline in (read_pipeline(FUSE), COMMON):
            after = pipeline.run(mixture_graph(routing, op, weights), observer=NumericsCheck())
            assert counts(after) == {"linear": 1, "routing": 1, "experts": 1}
            assert tuple(n.op for n in after.nodes if n.op.name in ("routing", "experts")) == fused(routing, op)


def test_weights_that_are_stored_in_out_are_transposed_by_the_pack_program() -> None:
    b = Model()
    x, weights = b.input("x", F32, (b.tokens, 4)), b.input("weights", F32, (b.tokens, 3))
    gate_up, down = (b.param(n, F32, s) for n, s in (("gate_up", (3, 4, 6)), ("down", (3, 3, 4))))
    turned = (b.transpose(w, axes=(0, 2, 1)) for w in (gate_up, down))
    graph = b.graph({"out": b.primitive(SILU, x, weights, *turned)})
    after = COMMON.run(graph, observer=NumericsCheck())
    assert counts(after) == {"experts": 1}
    (node,) = (n for n in after.nodes if n.op.name == "experts")
    assert node.op == SILU, "weights that no routing made may all be chosen"
    assert [v.op.name for v in node.inputs[2:]] == ["transpose", "transpose"]


def test_a_choice_by_logits_is_one_by_their_softmax() -> None:
    b = Model()
    logits = b.input("logits", F32, (b.tokens, 6))
    graph = b.graph({"out": b.mask(b.softmax(logits), b.top_k(logits, k=2), value=0.0)})
    after = read_pipeline("fuse-experts").run(graph, observer=NumericsCheck())
    assert [n.op for n in after.nodes] == [Routing(2, "softmax", False, 1.0)]


def test_a_sum_without_a_tiny_number_is_a_divisor_too() -> None:
    b = Model()
    logits = b.input("logits", F32, (b.tokens, 6))
    weights = b.primitive(Routing(2, "softmax", False, 1.0), logits)
    after = read_pipeline("fuse-experts").run(b.graph({"out": b.div(weights, b.sum(weights))}), PassContext())
    assert [n.op for n in after.nodes] == [PLAIN]


def masked(change: Callable[[Model, Value, Value], Value]) -> Graph:
    """What `change` makes of logits and their softmax, with 6 experts."""
    b = Model()
    logits = b.input("logits", F32, (b.tokens, 6))
    return b.graph({"out": change(b, logits, b.softmax(logits))})


def limited(
    b: Model,
    scores: Value,
    *,
    value: float = -math.inf,
    best: int = 1,
    rows: int = 3,
    other: bool = False,
    kept: bool = True,
    total: str = "sum",
) -> Value:
    """Routing over 3 groups of 2, with one thing another way."""
    t = b.tokens
    grouped = b.reshape(scores, shape=(t, rows, 6 // rows))
    of = b.reshape(b.neg(scores), shape=(t, rows, 6 // rows)) if other else grouped
    sums = getattr(b, total)(b.mask(of, b.top_k(of, k=best), value=0.0))
    chosen = b.top_k(b.reshape(sums, shape=(t, rows)), k=2)
    if not kept:
        chosen = b.greater_equal(b.reshape(sums, shape=(t, rows)), b.constant([[0.5]], F32))
    left = b.mask(grouped, b.reshape(chosen, shape=(t, rows, 1)), value=value)
    result: Value = b.mask(scores, b.top_k(b.reshape(left, shape=(t, 6)), k=2), value=0.0)
    return result


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b, x, s: b.mask(s, b.top_k(s, k=2), value=-1.0), "want the k largest, else 0, found top_k, else -1.0"),
        (
            lambda b, x, s: b.mask(s, b.greater_equal(s, x), value=0.0),
            "want the k largest, else 0, found greater_equal, else 0.0",
        ),
        (lambda b, x, s: b.mask(b.exp(x), b.top_k(x, k=2), value=0.0), "want scores of softmax or sigmoid, found exp"),
        (lambda b, x, s: b.mask(s, b.top_k(b.neg(x), k=2), value=0.0), "the choice is by neg, not by the scores"),
        (lambda b, x, s: b.mask(b.sigmoid(x), b.top_k(x, k=2), value=0.0), "the choice is by input, not by the"),
        (lambda b, x, s: b.mask(s, b.top_k(b.add(s, x), k=2), value=0.0), "f32[tokens, 6], is no bias [experts]"),
        (
            lambda b, x, s: limited(b, s, value=0.0),
            "-inf as choice scores outside the best groups, found mask {value=0.0}",
        ),
        (
            lambda b, x, s: limited(b, s, rows=2, best=3),
            "want the largest or the two largest of a group, found top_k {k=3}",
        ),
        (lambda b, x, s: limited(b, s, other=True), "want sums of a group's largest choice scores"),
        (lambda b, x, s: limited(b, s, total="mean"), "want sums of a group's largest choice scores, found mean"),
        (lambda b, x, s: limited(b, s, kept=False), "want the best of 3 groups, found greater_equal"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_near_misses_of_routing(change: Callable[[Model, Value, Value], Value], reason: str) -> None:
    context = PassContext()
    after = read_pipeline("fuse-experts").run(masked(change), context)
    assert counts(after)["routing"] == 0
    assert any(reason in str(r) for r in context.refusals["routing"]), context.refusals["routing"]


@pytest.mark.parametrize(
    ("change", "rule", "reason"),
    [
        (lambda b, w, s: b.div(w, b.sum(s)), "normalised-routing", "want the sum of the weights as divisor, found sum"),
        (
            lambda b, w, s: b.div(w, b.add_scalar(b.sum(w), value=1e-6)),
            "normalised-routing",
            "want the sum of the weights as divisor, found add_scalar",
        ),
        (lambda b, w, s: b.div(s, b.sum(w)), "normalised-routing", "want routing, found input"),
        (
            lambda b, w, s: b.div(b.routing(s, k=2, scoring="softmax", normalise=True, scale=1.0), b.sum(w)),
            "normalised-routing",
            "the routing is divided or scaled already",
        ),
        (lambda b, w, s: b.mul_scalar(s, value=2.0), "scaled-routing", "want routing, found input"),
    ],
)
def test_near_misses_of_what_follows_routing(
    change: Callable[[Model, Value, Value], Value], rule: str, reason: str
) -> None:
    b = Model()
    logits = b.input("logits", F32, (b.tokens, 6))
    weights = b.routing(logits, k=2, scoring="softmax", normalise=False, scale=1.0)
    context = PassContext()
    read_pipeline("fuse-experts").run(b.graph({"out": change(b, weights, logits)}), context)
    assert context.counts[rule] == 0
    assert any(reason in str(r) for r in context.refusals[rule]), context.refusals[rule]


def handmade(
    *,
    weight_input: bool = False,
    order: tuple[int, int] = (0, 1),
    wide: bool = False,
    gate: str = "silu",
    bias: str = "",
    shared: bool = True,
    combine: str = "weights",
    narrow: bool = False,
) -> Graph:
    """Three experts, 4 wide outside and 5 inside, with one thing another way."""
    b = Model()
    t = b.tokens
    x = b.input("x", F32, (t, 4) if shared else (3, t, 4))
    weights = b.input("weights", F32, (t, 3))
    rows = 15 if wide else 10
    gate_up = b.input("gate_up", F32, (3, 4, rows)) if weight_input else b.param("gate_up", F32, (3, 4, rows))
    both = b.matmul(x, b.param("one", F32, (4, rows)) if narrow else gate_up)
    if bias == "gate_up":
        both = b.add(both, b.param("bias", F32, (3, 1, rows)))
    halves = [b.slice(both, axis=2, start=5 * i, stop=5 * i + 5) for i in order]
    if gate == "other":
        halves[1] = b.slice(b.neg(both), axis=2, start=5, stop=10)
    if gate == "sum":
        inner = b.add(b.silu(halves[0]), halves[1])
    elif gate == "two":
        inner = b.mul(b.silu(halves[0]), b.silu(halves[1]))
    elif gate == "clamped apart":
        up, g = (b.clamp(h, low=low, high=high) for h, low, high in ((halves[1], -7.0, 7.0), (halves[0], -9e9, 7.0)))
        inner = b.mul(b.add_scalar(up, value=1.0), b.mul(g, b.sigmoid(b.mul_scalar(g, value=1.702))))
    elif gate == "none":
        inner = b.mul(*halves)
    else:
        inner = b.mul(b.silu(halves[0]), halves[1])
    y = b.matmul(inner, b.param("down", F32, (3, 5, 4)))
    if bias == "activation":
        y = b.add(y, b.reshape(b.input("shift", F32, (3, 4)), shape=(3, 1, 4)))
    if combine == "softmax":
        y = b.softmax(y)
    mixed = b.transpose(y, axes=(1, 0, 2))
    rows_ = b.reshape(weights, shape=(t, 1, 3))
    if combine == "two":
        rows_ = b.concat(rows_, rows_, axis=1)
    return b.graph({"out": b.matmul(rows_, mixed)})


def test_experts_made_by_hand_fuse() -> None:
    after = read_pipeline("fuse-mlp,fuse-experts,canonicalize").run(handmade(), observer=NumericsCheck())
    assert counts(after)["experts"] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_input": True}, "the experts' weights do not depend on parameters alone"),
        ({"narrow": True, "shared": False}, "f32[4, 10] are no weights of 3 experts"),
        ({"order": (1, 0)}, "gate is not the first half of the product, and up the second"),
        ({"wide": True}, "gate is not the first half of the product, and up the second"),
        ({"gate": "other"}, "gate and up are no slices of one product"),
        ({"gate": "sum"}, "want a gate times up, found add"),
        ({"gate": "two"}, "gate and up are no slices of one product"),
        ({"gate": "none"}, "want an activation of gate times up, or both clamped, found slice and slice"),
        ({"gate": "clamped apart"}, "or both clamped, found add_scalar and mul"),
        ({"bias": "gate_up"}, "only one of the two products has a bias"),
        ({"bias": "activation"}, "f32[3, 1, 4], is no bias [3, 1, 4] of parameters"),
        ({"shared": False}, "experts of f32[3, tokens, 4], want one [t, h] for all of them"),
        ({"combine": "softmax"}, "want the product with experts' weights, found softmax"),
        ({"combine": "two"}, "want weights [tokens, 1, 3], found f32[tokens, 2, 3]"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_near_misses_of_experts(changes: dict[str, bool], reason: str) -> None:
    context = PassContext()
    after = read_pipeline("fuse-mlp,fuse-experts").run(handmade(**changes), context)  # type: ignore[arg-type]
    assert counts(after)["experts"] == 0
    assert any(reason in str(r) for r in context.refusals["experts"]), context.refusals["experts"]


@pytest.mark.parametrize("activations", [INT8, KEPT])
@pytest.mark.parametrize("routing", [PLAIN, GROUPED], ids=lambda v: v if isinstance(v, str) else "")
def test_quantized_experts_compute_with_codes(activations: str, routing: Routing) -> None:
    """Widths of which the last group is not full; the router's linear stays."""
    graph = mixture_graph(routing, CLAMPED, DType.BF16, hidden=40, inner=33)
    after = model_pipeline(Quantize("q8", activations=activations)).run(graph, observer=NumericsCheck())
    name = "quantized_experts" if activations == INT8 else "experts"
    assert counts(after) == {"linear": 1, "routing": 1, name: 1}
    packed = [n.op.name for n in after.nodes if n in after.parameter_only]
    assert packed.count("quantize_weight") == 2
    assert parse(str(after)) == after


def test_experts_whose_weights_are_no_parameters_are_kept() -> None:
    b = Model()
    x, weights = b.input("x", F32, (b.tokens, 4)), b.input("weights", F32, (b.tokens, 3))
    down = b.param("down", F32, (3, 4, 5))
    y = b.experts(x, weights, b.input("gate_up", F32, (3, 10, 4)), down, activation="silu")
    after = read_pipeline("quantize{format=q4}").run(b.graph({"out": y}), PassContext())
    assert counts(after) == {"experts": 1}


def test_a_router_is_not_packed_with_another_linear() -> None:
    b = Model()
    x = b.input("x", F32, (b.tokens, 4))
    with b.at("mlp"):
        y = mixture(b, x)
    graph = b.graph({"out": y, "gate": b.project("gate", x, 1)})
    context = PassContext()
    after = COMMON.run(graph, context)
    assert counts(after)["linear"] == 2
    reasons = " ".join(map(str, context.refusals["pack-linears"]))
    assert "a routing reads the linear" in reasons
    assert "another linear reads its input, but a routing reads that" in reasons
