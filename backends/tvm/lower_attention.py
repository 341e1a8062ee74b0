"""Attention in ops that have kernels: first for any step, then for steps that have one token of each sequence."""

from __future__ import annotations

from typing import Any

from llmc.backends.tvm.attention_ops import AppendKeys, CombineSplits, RotatedAttention, SplitAttention, queries
from llmc.backends.tvm.splits import split_length
from llmc.ir.errors import NoKernel
from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.ops.cache import QkvAppend, RopeAppend
from llmc.ir.ops.rope import Rope
from llmc.ir.ops.shape import Slice
from llmc.ir.types import DType


def lower_append(b: Emitter, op: RopeAppend | QkvAppend, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
    """Queries, and the states of an `append_keys`. The queries are what `lower_attention` recognises and replaces.
    Raises `NoKernel` for states of 8-bit floats."""
    if inputs[-1].type.dtype is DType.F8E4M3:
        raise NoKernel(f"no CPU kernel for {op.name} into states of f8e4m3 at {b.loc or 'no place'}")
    rotation: dict[str, Any] = {"rotary_dim": 0, "layout": "half"}
    if isinstance(op, RopeAppend):
        rotation = {"rotary_dim": op.rotary_dim, "layout": op.layout}
    append = AppendKeys(
        op.num_heads, op.num_kv_heads, op.head_dim, **rotation, scaled=op.scaled, value_dim=op.value_dim
    )
    q = queries(b, op.num_heads, op.head_dim, rotation, *inputs[: append.leading])
    return q, *b(append, *inputs)


def lower_attention(b: Emitter, op: PagedAttention, inputs: tuple[Value, ...], longest: int) -> Value | None:
    """`rotated_attention` where the queries come from `lower_append`, else None."""
    q, *rest = inputs
    rotation: dict[str, Any] = {"rotary_dim": 0, "layout": "half"}
    tables: tuple[Value, ...] = ()
    if isinstance(q.op, Rope):
        rotation = {"rotary_dim": q.op.rotary_dim, "layout": q.op.layout}
        q, *tables_ = q.node.inputs
        tables = tuple(tables_)
    if not isinstance(q.op, Slice):
        return None
    rotated = RotatedAttention(**vars(op), **rotation, split=split_length(longest))
    return b.one(rotated, q.node.inputs[0], *tables, *rest)


def entry_graph(name: str, graph: Graph, longest: int) -> Graph:
    """A lowered, specialised graph in the form that its entry point runs."""
    return one_token_each(graph, longest) if name == "decode" else graph


def one_token_each(graph: Graph, longest: int) -> Graph:
    """A lowered decode graph, whose `sequences` are its `tokens`: appending and attention become `split_attention`,
    which any number of tasks can share, and `combine_splits`."""
    partials: dict[Value, Value] = {}

    def emit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        b = Emitter()
        b.loc = node.loc
        op = node.op
        if isinstance(op, AppendKeys):
            readers = [n for n, _ in graph.uses.get(node.results[0], ()) if isinstance(n.op, RotatedAttention)]
            if len(readers) == 1 and readers[0].inputs[: op.leading] == node.inputs[: op.leading]:
                (reader,) = readers
                attention = reader.op
                assert isinstance(attention, RotatedAttention)
                positions, _, block_tables, *per_head = reader.inputs[attention.leading + attention.states :]
                split = SplitAttention(
                    **op.heads,
                    **op.rotation,
                    **attention.of_scores,
                    split=attention.split,
                    splits=-(-longest // attention.split),
                )
                partial, *states = b(split, *inputs, positions, block_tables, *per_head[: attention.alibi])
                partials[reader.results[0]] = partial
                return tuple(states)
        if node.results[0] in partials:
            assert isinstance(op, RotatedAttention)
            positions, _, _, *per_head = node.inputs[op.leading + op.states :]
            combine = CombineSplits(op.num_heads, op.value_width, op.split, op.window, op.sinks)
            return (b.one(combine, partials[node.results[0]], positions, *per_head[op.alibi :]),)
        return node.results if inputs == node.inputs else b.make(op, inputs).results

    return graph.map(emit)
