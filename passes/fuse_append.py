"""Rotation, split and cache append of one joint row, in one op: queries, keys and values are read once.

A joint row is most often a projection's result. Where queries, keys and values come from elsewhere, they are joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.ops.cache import KvAppend, QkvAppend, RopeAppend, joint_edges, state_count
from llmc.ir.ops.rope import Rope
from llmc.ir.ops.shape import Slice
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.passes.base import Pass, PassContext
from llmc.passes.norm_heads import NormHeadsRule


@dataclass(frozen=True)
class FuseAppend(Pass):
    """`rope_append` where queries and keys are rotated alike, `qkv_append` of what they are everywhere else;
    `norm_heads` where queries and keys of a joint row are normalised first."""

    name = "fuse-append"
    stage = "step"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        graph = context.rewrite(graph, AppendRule(rotated=True), AppendRule(rotated=False))
        return context.rewrite(context.rewrite(graph, JoinRule()), NormHeadsRule())


class AppendRule(Rule):
    """kv_append of two slices of one joint row (see `QkvAppend`), whose rest is the queries."""

    roots = (KvAppend,)

    def __init__(self, rotated: bool) -> None:
        self.rotated = rotated

    def title(self) -> str:
        return "rope-append" if self.rotated else "qkv-append"

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        key, value, slots, *states = root.inputs
        if isinstance(key.op, Rope) is not self.rotated:
            return NoMatch("keys are not rotated" if self.rotated else "keys are rotated", root)
        keys = key.node.inputs[0] if self.rotated else key
        if not (isinstance(keys.op, Slice) and isinstance(value.op, Slice)):
            return NoMatch(f"keys and values are no slices, but {keys.op.name} and {value.op.name}", root, 1)
        qkv = keys.node.inputs[0]
        assert isinstance(root.op, KvAppend)
        wide = keys.op.start
        if wide % root.op.head_dim or wide == 0:
            return NoMatch(f"keys begin at column {wide}, which leaves no whole query heads before them", root, 2)
        heads = {
            "num_heads": wide // root.op.head_dim,
            "num_kv_heads": root.op.num_kv_heads,
            "head_dim": root.op.head_dim,
            "value_dim": root.op.value_dim,
        }
        _, middle, end = joint_edges(**heads)
        wanted = Slice(1, wide, middle), Slice(1, middle, end)
        if value.node.inputs[0] != qkv or (keys.op, value.op) != wanted or qkv.type.shape[1] != end:
            return NoMatch("queries, keys and values do not follow each other in one projection", root, 2)
        queries = [n for n, _ in graph.uses[qkv] if n.op == Slice(1, 0, wide)]
        if len(queries) != 1:
            return NoMatch(f"want one slice of the {wide} query columns, found {len(queries)}", root, 3)
        nodes = {root, keys.node, value.node, queries[0]}
        operands = {"qkv": qkv, "slots": slots, **{f"state{i}": v for i, v in enumerate(states)}}
        scaled = root.op.scaled
        query = queries[0].results[0]
        if not self.rotated:
            return Match(
                root, operands, {"op": QkvAppend(**heads, scaled=scaled)}, frozenset(nodes), (query, *root.results)
            )
        rope = key.op
        assert isinstance(rope, Rope)
        tables = key.node.inputs[1:]
        readers = [n for n, _ in graph.uses.get(query, ())]
        matching = Rope(heads["num_heads"], rope.head_dim, rope.rotary_dim, rope.layout)
        if len(readers) != 1 or readers[0].op != matching or readers[0].inputs[1:] != tables:
            found = ", ".join(map(repr, readers))
            return NoMatch(f"queries are not rotated as keys are: want {matching}, found {found}", root, 4)
        op = RopeAppend(**heads, rotary_dim=rope.rotary_dim, layout=rope.layout, scaled=scaled)
        operands |= {"cos": tables[0], "sin": tables[1]}
        replaced = (readers[0].results[0], *root.results)
        return Match(root, operands, {"op": op}, frozenset(nodes | {key.node, readers[0]}), replaced)

    def rewrite(self, b: Emitter, match: Match) -> Any:
        tables: tuple[Value, ...] = (match["cos"], match["sin"]) if self.rotated else ()
        op = match.attributes["op"]
        states = (match[f"state{i}"] for i in range(state_count(op.scaled)))
        return b(op, match["qkv"], *tables, match["slots"], *states)


class JoinRule(Rule):
    """paged_attention over states to which one kv_append wrote: queries, keys and values are joined, then appended.

    Queries and keys that are rotated alike are joined as they were before.
    """

    name = "join-append"
    roots = (PagedAttention,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        op = root.op
        assert isinstance(op, PagedAttention)
        q, *rest = root.inputs
        states, append = rest[: state_count(op.scaled)], rest[0].node
        if not isinstance(append.op, KvAppend) or tuple(states) != append.results:
            return NoMatch(f"the states come from {append.op.name}, want all from one kv_append", append)
        k, v, slots, *before = append.inputs
        operands = {"q": q, "k": k, "v": v, "slots": slots}
        heads = {n: getattr(op, n) for n in ("num_heads", "num_kv_heads", "head_dim", "scaled", "value_dim")}
        attributes: dict[str, Any] = {"op": QkvAppend(**heads)}
        if isinstance(q.op, Rope) and isinstance(k.op, Rope) and _turned_alike(q, k):
            rotation: dict[str, Any] = {"rotary_dim": q.op.rotary_dim, "layout": q.op.layout}
            attributes = {"op": RopeAppend(**heads, **rotation)}
            operands |= {"q": q.node.inputs[0], "k": k.node.inputs[0], "cos": q.node.inputs[1], "sin": q.node.inputs[2]}
        operands |= {f"state{i}": value for i, value in enumerate(before)}
        operands |= {f"rest{i}": value for i, value in enumerate(rest[len(states) :])}
        return Match(root, operands, attributes, frozenset({root, append}), (*append.results, *root.results))

    def rewrite(self, b: Emitter, match: Match) -> Any:
        op, count = match.attributes["op"], len(match.replaced) - 1
        joint = b.concat(match["q"], match["k"], match["v"], axis=1)
        tables = [match["cos"], match["sin"]] if isinstance(op, RopeAppend) else []
        q, *states = b(op, joint, *tables, match["slots"], *(match[f"state{i}"] for i in range(count)))
        rest = [match[f"rest{i}"] for i in range(len(match.root.inputs) - 1 - count)]
        return *states, b.one(match.root.op, q, *states, *rest)


def _turned_alike(q: Value, k: Value) -> bool:
    """Whether two rotated values have the same tables, and the same pairs in each head."""
    x, y = q.op, k.op
    assert isinstance(x, Rope) and isinstance(y, Rope)
    pairs = (x.head_dim, x.rotary_dim, x.layout) == (y.head_dim, y.rotary_dim, y.layout)
    return pairs and q.node.inputs[1:] == k.node.inputs[1:]
