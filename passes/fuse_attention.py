"""Causal attention, from its primitive form: softmax(mask(q kᵀ · scale)) v over heads, with grouped keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmc.ir.graph import Graph
from llmc.ir.op import ConstantData, Emitter, Node, Value
from llmc.ir.ops.linear import Matmul
from llmc.ir.ops.reduce import SinkSoftmax, Softmax
from llmc.ir.ops.shape import Constant, Expand, Reshape, Transpose
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.ir.types import Dim, DType
from llmc.passes.attention_mask import Refused, causal_window
from llmc.passes.attention_scores import Bias, read_scores, unscaled
from llmc.passes.base import Pass, PassContext
from llmc.passes.position_forms import squeezed
from llmc.passes.views import reshaped, through_transposes


@dataclass(frozen=True)
class FuseAttention(Pass):
    """`attention`, which needs no [heads, tokens, tokens] scores, and which `paged-kv` can page.

    Scores may be scaled anywhere, capped, biased by slopes times distances (ALiBi), and masked by a window besides
    causality; the softmax may have sinks, and values another width than keys.
    """

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
        attributes = dict(match.attributes)
        factor, value_width = attributes.pop("factor"), attributes.pop("value_width")
        tokens, heads, kv_heads = match["q"].type.shape[0], attributes["num_heads"], attributes["num_kv_heads"]
        width = attributes["head_dim"]
        operands = [
            reshaped(b, match["q"], (tokens, heads * width)),
            reshaped(b, match["k"], (tokens, kv_heads * width)),
            reshaped(b, match["v"], (tokens, kv_heads * value_width)),
            match["positions"],
        ]
        if attributes["alibi"]:
            operands.append(_slopes(b, match.operands.get("slopes"), factor, heads))
        if attributes["sinks"]:
            operands.append(_of_heads(b, match["sinks"], heads))
        return reshaped(b, b.attention(*operands, **attributes), match.replaced[0].type.shape)


def _slopes(b: Emitter, slopes: Value | None, factor: float, heads: int) -> Value:
    """Slopes f32 [heads], times a factor; without any the factor is the slope of every head."""
    if slopes is None:
        return b.one(Constant(DType.F32, ConstantData(np.full(heads, factor, np.float32))))
    vector = _of_heads(b, slopes, heads)
    result: Value = vector if factor == 1.0 else b.mul_scalar(vector, value=factor)
    return result


def _of_heads(b: Emitter, value: Value, heads: int) -> Value:
    """A number for each head as f32 [heads]."""
    vector = reshaped(b, value, (heads,))
    result: Value = vector if vector.type.dtype is DType.F32 else b.cast(vector, dtype=DType.F32)
    return result


def _match(root: Node) -> Match:
    (mixed,) = root.inputs
    if not isinstance(mixed.op, Matmul) or root.op != Transpose((1, 0, 2)):
        raise Refused("no product of weights and values whose heads are put beside each other", root, 0)
    weights, values = mixed.node.inputs
    nodes = {root, mixed.node}
    while isinstance(weights.op, Reshape) and squeezed(weights.type.shape) == squeezed(_operand(weights).type.shape):
        nodes.add(weights.node)
        weights = _operand(weights)
    if not isinstance(weights.op, Softmax | SinkSoftmax):
        raise Refused(f"want softmax, found {weights.op.name}", weights.node, 1)
    scores = read_scores(weights.node.inputs[0])
    nodes |= {weights.node, *scores.nodes}
    left, right = scores.product.node.inputs
    left, left_scale = _unscaled(left)
    right, right_scale = _unscaled(right)
    q, k, v = _heads(left), _keys(right), _heads(values)
    _check_heads(q, k, v, scores.product.node)
    positions, window = causal_window(scores.conditions, q.value.type.shape[0])
    operands = {"q": q.value, "k": k.value, "v": v.value, "positions": positions}
    sinks = isinstance(weights.op, SinkSoftmax)
    if sinks:
        operands["sinks"] = _sinks(weights, q.count)
    factor = 0.0
    if scores.biases:
        slopes, factor = _alibi(scores.biases, positions, q.count, sinks)
        operands |= {} if slopes is None else {"slopes": slopes}
    attributes = {
        "num_heads": q.count,
        "num_kv_heads": k.count,
        "head_dim": q.width,
        "scale": scores.scale * left_scale * right_scale,
        "window": window,
        "soft_cap": scores.soft_cap,
        "alibi": bool(scores.biases),
        "sinks": sinks,
        "value_dim": 0 if v.width == k.width else v.width,
        "value_width": v.width,
        "factor": factor,
    }
    return Match(root, operands, attributes, frozenset(nodes), root.results)


def _operand(value: Value) -> Value:
    return value.node.inputs[0]


def _sinks(weights: Value, heads: int) -> Value:
    """The sinks behind the axes that broadcast over tokens."""
    sink = weights.node.inputs[1]
    if squeezed(sink.type.shape) != squeezed((heads,)) or sink.type.shape[-2:] != (1, 1):
        raise Refused(f"sinks are {sink.type}, want one for each of {heads} heads", weights.node, 2)
    return sink


def _alibi(biases: list[Bias], positions: Value, heads: int, sinks: bool) -> tuple[Value | None, float]:
    """The slopes, and their factor. What a bias adds to all scores of a query is nothing to a softmax, but to sinks.

    Slopes times (key - query) and slopes times key are then the same.
    """
    bias = biases[0]
    if len(biases) > 1:
        raise Refused("two biases are added to the scores, want one", biases[1].node, 5)
    if bias.slopes is not None and squeezed(bias.slopes.type.shape) != squeezed((heads,)):
        raise Refused(f"slopes are {bias.slopes.type}, want one for each of {heads} heads", bias.node, 5)
    by_key, by_query = bias.form.along(0), bias.form.along(1)
    if set(by_key) != {positions} or not set(by_query) <= {positions} or len(bias.form.terms) > 2:
        raise Refused("the bias is no slope times the positions of keys", bias.node, 5)
    factor = by_key[positions]
    if sinks and (by_query.get(positions) != -factor or bias.form.constant):
        raise Refused("beside sinks a bias must be slope times (key - query)", bias.node, 5)
    return bias.slopes, factor


def _unscaled(value: Value) -> tuple[Value, float]:
    scale = 1.0
    while (scaled := unscaled(value)) is not None:
        value, factor = scaled
        scale *= factor
    return value, scale


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


def _check_heads(q: Heads, k: Heads, v: Heads, node: Node) -> None:
    if k.count != v.count or q.count % k.count or q.width != k.width:
        found = ", ".join(f"{n} [{h.count}, {h.width}]" for n, h in (("q", q), ("k", k), ("v", v)))
        raise Refused(f"heads that do not go together: {found}", node, 8)
    if len({h.value.type.shape[0] for h in (q, k, v)}) > 1:
        raise Refused("queries and keys of different lengths (cross-attention?)", node, 8)
