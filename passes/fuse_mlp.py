"""Activations from their primitive forms; gated products; activations inside the linear that they follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.elementwise import ACTIVATIONS, GeluErf, GeluTanh, Mul, Silu
from llmc.ir.ops.linear import Linear
from llmc.ir.ops.shape import Slice
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Fuse, Rule
from llmc.passes.base import Pass, PassContext, common_place

_NAMES = {kind: name for name, kind in ACTIVATIONS.items()}


@dataclass(frozen=True)
class FuseMlp(Pass):
    """`silu`, `gelu_tanh`, `gelu_erf`; then act(linear) * linear as one `gated_linear`; then act(linear) as one."""

    name = "fuse-mlp"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        graph = context.rewrite(graph, Fuse(Silu), Fuse(GeluTanh), Fuse(GeluErf))
        graph = context.rewrite(graph, Gated())
        return context.rewrite(graph, ActivationIntoLinear())


@dataclass(frozen=True)
class _Half:
    """One factor of a gated product: rows `start` to `stop` of a linear, the activation on them, the nodes between."""

    linear: Node
    start: int
    stop: int
    activation: str
    nodes: frozenset[Node]


class Gated(Rule):
    """act(linear(x, A)) * linear(x, B), or the same of two slices of one linear, in either order."""

    name = "gated-linear"
    roots = (Mul,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        gate, up = _half(root.inputs[0]), _half(root.inputs[1])
        if gate is None or up is None:
            found = [v.op.name for v, half in zip(root.inputs, (gate, up), strict=True) if half is None]
            return NoMatch(
                f"a factor is no linear with or without an activation: {', '.join(found)}", root, 2 - len(found)
            )
        if gate.activation == "none":
            gate, up = up, gate
        if gate.activation == "none" or up.activation != "none":
            return NoMatch(f"want an activation on one factor, found {gate.activation} and {up.activation}", root, 2)
        if gate.linear.inputs[0] != up.linear.inputs[0]:
            return NoMatch("the factors are linears of different inputs", root, 3)
        if gate.stop - gate.start != up.stop - up.start:
            return NoMatch("the factors have different widths", root, 3)
        kinds = [[v.type.dtype for v in half.linear.inputs[1:]] for half in (gate, up)]
        if kinds[0] != kinds[1]:
            return NoMatch("only one factor has a bias, or their weights have different dtypes", root, 3)
        operands = {"x": gate.linear.inputs[0]}
        for name, half in (("gate", gate), ("up", up)):
            operands |= {f"{name}{i}": v for i, v in enumerate(half.linear.inputs[1:])}
        nodes = frozenset({root}) | gate.nodes | up.nodes
        return Match(root, operands, {"gate": gate, "up": up}, nodes, root.results)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        gate, up = match.attributes["gate"], match.attributes["up"]
        b.loc = common_place([b.loc, gate.linear.loc, up.linear.loc])
        joined = []
        for i in range(len(gate.linear.inputs) - 1):
            parts = [
                b.slice(match[f"{name}{i}"], axis=0, start=half.start, stop=half.stop)
                for name, half in (("gate", gate), ("up", up))
            ]
            joined.append(b.concat(*parts, axis=0))
        return b.gated_linear(match["x"], *joined, activation=gate.activation, bias=len(joined) == 2)


def _half(value: Value) -> _Half | None:
    """The factor as rows of a linear."""
    nodes, activation = [], "none"
    if type(value.op) in _NAMES:
        activation = _NAMES[type(value.op)]
        nodes.append(value.node)
        (value,) = value.node.inputs
    start, stop = 0, value.type.shape[-1] if value.type.shape else None
    if isinstance(value.op, Slice) and value.op.axis == 1 and value.op.step == 1:
        start, stop = value.op.start, value.op.stop
        nodes.append(value.node)
        (value,) = value.node.inputs
    if not isinstance(value.op, Linear) or value.op.residual or not isinstance(stop, int):
        return None
    if value.op.activation != "none":
        if activation != "none":
            return None
        activation = value.op.activation
    return _Half(value.node, start, stop, activation, frozenset({*nodes, value.node}))


class ActivationIntoLinear(Rule):
    """act(linear(x, W)): the linear applies it to its result."""

    name = "linear-activation"
    roots = tuple(ACTIVATIONS.values())

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        (y,) = root.inputs
        if not isinstance(y.op, Linear):
            return NoMatch(f"want linear, found {y.op.name}", y.node)
        if y.op.activation != "none":
            return NoMatch(f"the linear has the activation {y.op.activation} already", y.node, 1)
        if y.op.residual:
            return NoMatch("the linear adds a residual after its activation", y.node, 1)
        operands = {f"operand{i}": v for i, v in enumerate(y.node.inputs)}
        return Match(root, operands, {"linear": y.node}, frozenset([root, y.node]), root.results)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        linear = match.attributes["linear"]
        b.loc = linear.loc
        activation = _NAMES[type(match.root.op)]
        return b.linear(*match.operands.values(), bias=linear.op.bias, activation=activation)
