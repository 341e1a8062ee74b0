"""Causal attention, from its primitive form: softmax(mask(q kᵀ · scale)) v over heads, with grouped keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.elementwise import GreaterEqual, LogicalAnd, Mask, MulScalar
from llmc.ir.ops.linear import Matmul
from llmc.ir.ops.reduce import Softmax
from llmc.ir.ops.shape import Expand, Reshape, Transpose
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.ir.types import Dim, DType, TensorType
from llmc.passes.base import Pass, PassContext
from llmc.passes.views import Refused, reshaped, through_reshapes, through_transposes

_HIDDEN = -1e30
"""Scores at or below this weigh exactly nothing after a softmax in any of our dtypes."""


@dataclass(frozen=True)
class FuseAttention(Pass):
    """`attention`, which needs no [heads, tokens, tokens] scores, and which `paged-kv` can page."""

    name = "fuse-attention"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return context.rewrite(graph, AttentionRule())


@dataclass(frozen=True)
class Heads:
    """A value [tokens, count, width] behind the layout changes of one operand; `shared` heads stand for one of it."""

    value: Value
    count: int
    width: int


class AttentionRule(Rule):
    """The root is the transpose that puts the heads [h, t, d] back beside each other [t, h, d]."""

    name = "attention"
    roots = (Transpose,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        try:
            return _match(root)
        except Refused as refused:
            return refused.refusal

    def rewrite(self, b: Emitter, match: Match) -> Any:
        heads = {n: match.attributes[n] for n in ("num_heads", "num_kv_heads", "head_dim", "scale")}
        tokens = match["q"].type.shape[0]
        flat = []
        for name, count in (("q", heads["num_heads"]), ("k", heads["num_kv_heads"]), ("v", heads["num_kv_heads"])):
            flat.append(reshaped(b, match[name], (tokens, count * heads["head_dim"])))
        result = b.attention(*flat, match["positions"], **heads)
        return reshaped(b, result, match.replaced[0].type.shape)


def _match(root: Node) -> Match:
    (mixed,) = root.inputs
    if not isinstance(mixed.op, Matmul) or root.op != Transpose((1, 0, 2)):
        raise Refused("no product of weights and values whose heads are put beside each other", root, 0)
    weights, values = mixed.node.inputs
    if not isinstance(weights.op, Softmax):
        raise Refused(f"want softmax, found {weights.op.name}", weights.node, 1)
    (masked,) = weights.node.inputs
    if not isinstance(masked.op, Mask):
        raise Refused(f"the scores are not masked (found {masked.op.name}): this is not causal", masked.node, 2)
    if masked.op.value > _HIDDEN:
        raise Refused(f"masked scores become {masked.op.value}, want -inf", masked.node, 3)
    scores, visible = masked.node.inputs
    positions = _causal_positions(visible)
    nodes = {root, mixed.node, weights.node, masked.node}
    scale = 1.0
    while isinstance(scores.op, MulScalar):
        scale *= scores.op.value
        nodes.add(scores.node)
        (scores,) = scores.node.inputs
    if not isinstance(scores.op, Matmul):
        raise Refused(f"want the product of queries and keys, found {scores.op.name}", scores.node, 4)
    nodes.add(scores.node)
    left, right = scores.node.inputs
    left, left_scale = _unscaled(left)
    right, right_scale = _unscaled(right)
    q, k, v = _heads(left), _keys(right), _heads(values)
    _check_heads(q, k, v, positions, scores.node)
    attributes = {
        "num_heads": q.count,
        "num_kv_heads": k.count,
        "head_dim": q.width,
        "scale": scale * left_scale * right_scale,
    }
    operands = {"q": q.value, "k": k.value, "v": v.value, "positions": positions}
    return Match(root, operands, attributes, frozenset(nodes), root.results)


def _unscaled(value: Value) -> tuple[Value, float]:
    scale = 1.0
    while isinstance(value.op, MulScalar):
        scale *= value.op.value
        (value,) = value.node.inputs
    return value, scale


def _causal_positions(visible: Value) -> Value:
    """The i32 [t] of which the mask compares a column with a row."""
    base = through_reshapes(visible)
    if isinstance(base.op, LogicalAnd):
        raise Refused("the mask has a second condition beside causality (a window?)", base.node, 4)
    if not isinstance(base.op, GreaterEqual):
        raise Refused(f"the mask is no comparison of positions (found {base.op.name})", base.node, 4)
    column, row = base.node.inputs
    positions = through_reshapes(column)
    if positions.type.rank != 1 or positions != through_reshapes(row):
        raise Refused("the mask does not compare one vector of positions with itself", base.node, 4)
    (tokens,) = positions.type.shape
    if column.type.shape[-2:] != (tokens, 1) or row.type.shape[-1:] != (tokens,):
        raise Refused("the mask is not causal: tokens would see those after them", base.node, 5)
    if positions.type != TensorType(DType.I32, (tokens,)):
        raise Refused(f"positions are {positions.type}, want i32", base.node, 5)
    return positions


def _heads(value: Value) -> Heads:
    """The [t, h, d] behind a value [heads, t, d]."""
    value, group = _ungrouped(value, axis=0)
    base, axes = through_transposes(value)
    if base.type.rank != 3 or axes != (1, 0, 2):
        raise Refused(f"{value.type} are no heads: want [tokens, heads, width] with two axes swapped", value.node, 6)
    return _made(base, group)


def _keys(value: Value) -> Heads:
    """The [t, h, d] behind keys that are transposed for the product: [heads, d, t]."""
    base, axes = through_transposes(value)
    if base.type.rank == 3 and axes == (1, 2, 0):
        return _made(base, 1)
    if base.type.rank == 3 and axes == (0, 2, 1):
        return _heads(base)
    raise Refused(f"{value.type} are no keys: want the last two axes of heads swapped", value.node, 6)


def _made(base: Value, group: int) -> Heads:
    if group == 1:
        base, group = _ungrouped(base, axis=1)
    _, count, width = base.type.shape
    assert isinstance(count, int) and isinstance(width, int)
    return Heads(base, count, width)


def _ungrouped(value: Value, axis: int) -> tuple[Value, int]:
    """What was repeated along the axis of heads (each `group` times, one beside the other), and `group`."""
    if not isinstance(value.op, Reshape) or not isinstance(value.node.inputs[0].op, Expand):
        return value, 1
    expand = value.node.inputs[0].node
    narrow, wide = expand.inputs[0].type.shape, expand.types[0].shape
    if len(narrow) != 4 or len(wide) != 4 or [i for i in range(4) if narrow[i] != wide[i]] != [axis + 1]:
        found = f"[{', '.join(map(str, narrow))}] expanded to [{', '.join(map(str, wide))}]"
        raise Refused(f"want each head repeated beside itself, found {found}", expand, 7)
    group = wide[axis + 1]
    assert isinstance(group, int)
    shape: tuple[Dim, ...] = tuple(d for i, d in enumerate(narrow) if i != axis + 1)
    if (*wide[:axis], wide[axis] * group, *wide[axis + 2 :]) != value.type.shape:
        raise Refused(f"the repeated heads {expand.types[0]} are read as {value.type}", value.node, 7)
    return reshaped(Emitter(), expand.inputs[0], shape), group


def _check_heads(q: Heads, k: Heads, v: Heads, positions: Value, node: Node) -> None:
    if (k.count, k.width) != (v.count, v.width) or q.count % k.count or q.width != k.width:
        found = ", ".join(f"{n} [{h.count}, {h.width}]" for n, h in (("q", q), ("k", k), ("v", v)))
        raise Refused(f"heads that do not go together: {found}", node, 8)
    tokens = {h.value.type.shape[0] for h in (q, k, v)} | {positions.type.shape[0]}
    if len(tokens) > 1:
        raise Refused("queries, keys and positions of different lengths (cross-attention?)", node, 8)
