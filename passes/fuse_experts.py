"""A mixture of experts, from its primitive form: dense products over all experts, and who is chosen by whom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph, Param
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.elementwise import ACTIVATIONS, Add, AddScalar, Cast, Clamp, Mul, MulScalar, Sigmoid
from llmc.ir.ops.experts import GATE_FACTOR, Experts
from llmc.ir.ops.linear import Matmul
from llmc.ir.ops.routing import Routing
from llmc.ir.ops.shape import Slice, Transpose
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.ir.types import DType
from llmc.passes.base import Pass, PassContext
from llmc.passes.fuse_routing import NormalisedRouting, RoutingRule, ScaledRouting
from llmc.passes.views import Refused, reshaped, through_reshapes, through_transposes

_NAMES = {kind: name for name, kind in ACTIVATIONS.items()}
_STORED = (DType.F32, DType.F16, DType.BF16)


@dataclass(frozen=True)
class FuseExperts(Pass):
    """`routing`, then what follows it inside it, then `experts`, which reads the weights of chosen experts only."""

    name = "fuse-experts"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        for rule in (RoutingRule(), NormalisedRouting(), ScaledRouting(), ExpertsRule()):
            graph = context.rewrite(graph, rule)
        return graph


class ExpertsRule(Rule):
    """The root is the product of a token's weights [t, 1, experts] with what its experts say, [t, experts, h]."""

    name = "experts"
    roots = (Matmul,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        try:
            return _match(root, graph)
        except Refused as refused:
            return refused.refusal

    def rewrite(self, b: Emitter, match: Match) -> Any:
        op: Experts = match.attributes["op"]
        weights = reshaped(b, match["weights"], match.attributes["routed"])
        parts = [match["x"], weights, *(_as_stored(b, match[name]) for name in ("gate_up", "down"))]
        if op.bias:
            for name, part in (("gate_up_bias", parts[2]), ("down_bias", parts[3])):
                parts.append(reshaped(b, match[name], part.type.shape[:2]))
        return reshaped(b, b.one(op, *parts), match.replaced[0].type.shape)


@dataclass(frozen=True)
class _Product:
    """x times the weights [experts, k, n] of all experts, with or without a bias [experts, 1, n]."""

    x: Value
    matrix: Value
    bias: tuple[Value, ...]
    nodes: frozenset[Node]


def _match(root: Node, graph: Graph) -> Match:
    rows, mixed = root.inputs
    outer, axes = through_transposes(mixed)
    if outer.type.rank != 3 or axes != (1, 0, 2):
        raise Refused("no product of weights with what experts say, [experts, t, h] with two axes swapped", root, 0)
    experts, tokens, _ = outer.type.shape
    if rows.type.shape != (tokens, 1, experts):
        raise Refused(f"want weights [{tokens}, 1, {experts}], found {rows.type}", root, 1)
    down = _product(outer, graph, 2)
    both, attributes, gates = _gated(down.x)
    gate_up = _product(both, graph, 5)
    if gate_up.x.type.rank != 2:
        raise Refused(f"experts of {gate_up.x.type}, want one [t, h] for all of them", both.node, 6)
    if len(down.bias) != len(gate_up.bias):
        raise Refused("only one of the two products has a bias", root, 6)
    weights = _uncast(through_reshapes(_uncast(rows)))
    routing = through_reshapes(weights).op
    each = routing.k if isinstance(routing, Routing) else 0
    op = Experts(**attributes, bias=bool(down.bias), experts_per_token=each)
    operands = {"x": gate_up.x, "weights": weights, "gate_up": gate_up.matrix, "down": down.matrix}
    if op.bias:
        for name, (bias,) in (("gate_up_bias", gate_up.bias), ("down_bias", down.bias)):
            operands[name] = _uncast(through_reshapes(bias))
    nodes = frozenset({root}) | _between(mixed, outer) | down.nodes | gates | gate_up.nodes
    return Match(root, operands, {"op": op, "routed": (tokens, experts)}, nodes, root.results)


def _product(value: Value, graph: Graph, depth: int) -> _Product:
    bias: tuple[Value, ...] = ()
    nodes = {value.node}
    if isinstance(value.op, Add):
        product, added = value.node.inputs
        if not isinstance(product.op, Matmul):
            product, added = added, product
        experts, _, width = value.type.shape
        if not _is_weight(added, graph) or added.type.shape != (experts, 1, width):
            raise Refused(
                f"what is added, {added.type}, is no bias [{experts}, 1, {width}] of parameters", value.node, depth
            )
        bias, value = (added,), product
        nodes.add(value.node)
    if not isinstance(value.op, Matmul):
        raise Refused(f"want the product with experts' weights, found {value.op.name}", value.node, depth)
    x, matrix = value.node.inputs
    if not _is_weight(matrix, graph):
        raise Refused("the experts' weights do not depend on parameters alone", value.node, depth)
    if matrix.type.rank != 3 or matrix.type.shape[0] != value.type.shape[0]:
        raise Refused(f"{matrix.type} are no weights of {value.type.shape[0]} experts", value.node, depth)
    return _Product(x, matrix, bias, frozenset(nodes))


def _gated(inner: Value) -> tuple[Value, dict[str, Any], frozenset[Node]]:
    """Gate and up beside each other [experts, t, 2 · i], the attributes of their gating, the nodes of it."""
    if not isinstance(inner.op, Mul):
        raise Refused(f"want a gate times up, found {inner.op.name}", inner.node, 3)
    found = _plain_gate(*inner.node.inputs) or _plain_gate(*inner.node.inputs[::-1])
    found = found or _clamped_gate(*inner.node.inputs) or _clamped_gate(*inner.node.inputs[::-1])
    if found is None:
        names = " and ".join(v.op.name for v in inner.node.inputs)
        raise Refused(f"want an activation of gate times up, or both clamped, found {names}", inner.node, 3)
    gate, up, attributes, nodes = found
    if not (isinstance(gate.op, Slice) and isinstance(up.op, Slice) and gate.node.inputs == up.node.inputs):
        raise Refused("gate and up are no slices of one product", inner.node, 4)
    (both,) = gate.node.inputs
    width = inner.type.shape[2]
    assert isinstance(width, int)
    halves = Slice(2, 0, width), Slice(2, width, 2 * width)
    if (gate.op, up.op) != halves or both.type.shape[2] != 2 * width:
        raise Refused("gate is not the first half of the product, and up the second", inner.node, 4)
    return both, attributes, frozenset({inner.node, gate.node, up.node, *nodes})


_Gate = tuple[Value, Value, dict[str, Any], list[Node]]


def _plain_gate(active: Value, up: Value) -> _Gate | None:
    """activation(gate) · up."""
    if type(active.op) not in _NAMES:
        return None
    return active.node.inputs[0], up, {"activation": _NAMES[type(active.op)]}, [active.node]


def _clamped_gate(raised: Value, active: Value) -> _Gate | None:
    """(clamp(up) + 1) · (g · sigmoid(1.702 · g)), where g is gate with a limit above."""
    if raised.op != AddScalar(1.0) or not isinstance(active.op, Mul):
        return None
    (up,) = raised.node.inputs
    for gate, share in (active.node.inputs, active.node.inputs[::-1]):
        factor = share.node.inputs[0] if isinstance(share.op, Sigmoid) else None
        if factor is None or factor.op != MulScalar(GATE_FACTOR) or factor.node.inputs != (gate,):
            continue
        if not isinstance(up.op, Clamp) or not 0 < up.op.high < math.inf:
            return None
        limit = up.op.high
        if up.op != Clamp(-limit, limit) or gate.op != Clamp(-math.inf, limit):
            return None
        nodes = [raised.node, active.node, up.node, share.node, factor.node, gate.node]
        attributes = {"activation": "none", "gating": "clamped", "limit": limit}
        return gate.node.inputs[0], up.node.inputs[0], attributes, nodes
    return None


def _between(value: Value, start: Value) -> frozenset[Node]:
    """The nodes of a chain of transposes."""
    nodes = set()
    while value != start:
        nodes.add(value.node)
        (value,) = value.node.inputs
    return frozenset(nodes)


def _is_weight(value: Value, graph: Graph) -> bool:
    return isinstance(value.op, Param) or value.node in graph.parameter_only


def _uncast(value: Value) -> Value:
    """What a float was before a cast, which the op does itself."""
    if isinstance(value.op, Cast) and value.node.inputs[0].type.dtype in _STORED:
        return value.node.inputs[0]
    return value


def _as_stored(b: Emitter, matrix: Value) -> Value:
    """Weights [experts, n, k] behind those of a product, [experts, k, n], in their storage dtype."""
    base, axes = through_transposes(matrix)
    stored = _uncast(base)
    base, inner = through_transposes(stored)
    axes = tuple(inner[a] for a in axes)
    wanted = axes[0], axes[2], axes[1]
    return base if wanted == (0, 1, 2) else b.one(Transpose(wanted), base)
