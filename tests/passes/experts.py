"""A mixture of experts in primitive form, as blocks write it."""

from __future__ import annotations

from dataclasses import replace

from llmc.ir.graph import Graph
from llmc.ir.op import Value
from llmc.ir.ops.experts import Experts
from llmc.ir.ops.linear import Linear
from llmc.ir.ops.routing import Routing
from llmc.ir.types import DType
from tests.passes.graphs import F32, Model

PLAIN = Routing(2, "softmax", True, 1.0)
GROUPED = Routing(3, "sigmoid", True, 2.5, 3, 2, "top2", True)
SILU = Experts("silu")
CLAMPED = Experts("none", "clamped", True, 7.0)


def mixture(
    b: Model, x: Value, routing: Routing = PLAIN, op: Experts = SILU, *, experts: int = 6, inner: int = 5
) -> Value:
    """x [tokens, h] through the experts that the router chooses."""
    hidden = x.type.shape[1]
    assert isinstance(hidden, int)
    with b.at("router"):
        logits = b.primitive(Linear(), x, b.param(f"{b.loc}.weight", F32, (experts, hidden)))
        bias = [b.param(f"{b.loc}.bias", F32, (experts,))] if routing.bias else []
        weights = b.primitive(routing, logits, *bias)
    with b.at("experts"):
        stored = [((experts, 2 * inner, hidden), "gate_up"), ((experts, hidden, inner), "down")]
        parts = [b.param(f"{b.loc}.{name}", b.weights, shape) for shape, name in stored]
        parts += [b.param(f"{b.loc}.{name}_bias", b.weights, shape[:2]) for shape, name in stored if op.bias]
        return b.primitive(op, x, weights, *parts)


def mixture_graph(
    routing: Routing = PLAIN,
    op: Experts = SILU,
    weights: DType = F32,
    hidden: int = 4,
    experts: int = 6,
    inner: int = 5,
) -> Graph:
    """One mixture between an input and an output."""
    b = Model(weights)
    x = b.input("x", F32, (b.tokens, hidden))
    with b.at("mlp"):
        y = mixture(b, x, routing, op, experts=experts, inner=inner)
    return b.graph({"out": y})


def fused(routing: Routing, op: Experts) -> tuple[Routing, Experts]:
    """What the two become."""
    return routing, replace(op, experts_per_token=routing.k)
