"""Rotation, split and cache append of one joint projection, in one op: queries, keys and values are read once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.cache import KvAppend, QkvAppend, RopeAppend, state_count
from llmc.ir.ops.rope import Rope
from llmc.ir.ops.shape import Slice
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class FuseAppend(Pass):
    """`rope_append` where queries and keys are rotated, `qkv_append` where they are not."""

    name = "fuse-append"
    stage = "step"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return context.rewrite(graph, AppendRule(rotated=True), AppendRule(rotated=False))


class AppendRule(Rule):
    """kv_append of two slices of one [tokens, (num_heads + 2 · num_kv_heads) · head_dim], whose rest is the queries."""

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
        narrow = root.op.num_kv_heads * root.op.head_dim
        wide = keys.op.start
        if wide % root.op.head_dim or wide == 0:
            return NoMatch(f"keys begin at column {wide}, which leaves no whole query heads before them", root, 2)
        wanted = Slice(1, wide, wide + narrow), Slice(1, wide + narrow, wide + 2 * narrow)
        if value.node.inputs[0] != qkv or (keys.op, value.op) != wanted or qkv.type.shape[1] != wide + 2 * narrow:
            return NoMatch("queries, keys and values do not follow each other in one projection", root, 2)
        queries = [n for n, _ in graph.uses[qkv] if n.op == Slice(1, 0, wide)]
        if len(queries) != 1:
            return NoMatch(f"want one slice of the {wide} query columns, found {len(queries)}", root, 3)
        nodes = {root, keys.node, value.node, queries[0]}
        operands = {"qkv": qkv, "slots": slots, **{f"state{i}": v for i, v in enumerate(states)}}
        heads = {
            "num_heads": wide // root.op.head_dim,
            "num_kv_heads": root.op.num_kv_heads,
            "head_dim": root.op.head_dim,
        }
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
