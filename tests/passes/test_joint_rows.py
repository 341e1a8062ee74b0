"""Joint rows and projections: what is appended as one, split or normalised as one, and what is nearly so."""

from __future__ import annotations

import pytest

from llmc.ir.graph import Graph, State
from llmc.ir.op import Op, Value
from llmc.ir.ops.norm import LayerNorm, RmsNorm
from llmc.ir.types import DType, symbol
from llmc.passes.base import PassContext
from llmc.passes.observe import NumericsCheck
from llmc.passes.pipelines import read_pipeline
from tests.passes.graphs import F32, Model, counts


def appended(
    b: Model, *, queries: int = 8, key_start: int = 8, rotate_queries: bool = True, other_table: bool = False
) -> Graph:
    """A joint projection of 2 query heads, 1 key and 1 value head of width 4, rotated and appended."""
    t = b.tokens
    qkv = b.input("qkv", F32, (t, 16))
    slots = b.input("slots", DType.I32, (t,))
    cos, sin = (b.input(n, F32, (t, 2)) for n in ("cos", "sin"))
    q, k, v = (b.slice(qkv, axis=1, start=i, stop=j) for i, j in ((0, queries), (key_start, key_start + 4), (12, 16)))
    if rotate_queries:
        q = b.rope(q, sin if other_table else cos, sin, num_heads=queries // 4, head_dim=4, rotary_dim=4)
    k = b.rope(k, cos, sin, num_heads=1, head_dim=4, rotary_dim=4)
    blocks = symbol("num_blocks")
    key = b.state(State("key", "paged_kv", F32, (blocks, 1, 4, 16)))
    value = b.state(State("value", "paged_kv", F32, (blocks, 1, 16, 4)))
    key, value = b.kv_append(k, v, slots, key, value, num_kv_heads=1, head_dim=4)
    return b.graph({"q": q}, {"key": key, "value": value})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"other_table": True}, "queries are not rotated as keys are"),
        ({"rotate_queries": False}, "queries are not rotated as keys are"),
        ({"key_start": 4}, "do not follow each other in one projection"),
        ({"queries": 4}, "want one slice of the 8 query columns, found 0"),
    ],
)
def test_appends(changes: dict[str, int], reason: str) -> None:
    context = PassContext()
    read_pipeline("fuse-append").run(appended(Model(), **changes), context)  # type: ignore[arg-type]
    assert context.counts == {"rope-append": 0, "qkv-append": 0, "join-append": 0, "norm-heads": 0}
    assert reason in str(context.refusals["rope-append"][0])


def test_an_append_that_is_right_fuses() -> None:
    context = PassContext()
    read_pipeline("fuse-append").run(appended(Model()), context)
    assert context.counts == {"rope-append": 1, "qkv-append": 0, "join-append": 0, "norm-heads": 0}


def joined(b: Model, *, turned: str = "alike", read: str = "both") -> Graph:
    """Queries of 2 heads, keys and values of 1 from three projections, appended and read."""
    t, blocks, sequences = b.tokens, symbol("num_blocks"), symbol("sequences")
    x = b.embedding(b.token_ids, b.param("embed.weight", F32, (11, 4)), dtype=F32)
    q, k, v = (b.project(n, x, width) for n, width in (("q", 8), ("k", 4), ("v", 6)))
    slots = b.input("slot_mapping", DType.I32, (t,))
    cos, sin = b.table(4)
    if turned != "not":
        q = b.rope(q, cos, sin, num_heads=2, head_dim=4, rotary_dim=4)
        k = b.rope(k, cos, cos if turned == "apart" else sin, num_heads=1, head_dim=4, rotary_dim=4)
    states = [
        b.state(State("key", "paged_kv", F32, (blocks, 1, 4, 16))),
        b.state(State("value", "paged_kv", F32, (blocks, 1, 16, 6))),
    ]
    key, value = b.kv_append(k, v, slots, *states, num_kv_heads=1, head_dim=4, value_dim=6)
    start = b.input("query_start", DType.I32, (sequences + 1,))
    tables = b.input("block_tables", DType.I32, (sequences, symbol("max_blocks")))
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "value_dim": 6}
    seen = states[1] if read == "old" else value
    out = b.paged_attention(q, key, seen, b.positions, start, tables, scale=0.5, **heads)
    return b.graph(
        {"out": b.gather_rows(out, b.input("logit_rows", DType.I32, (symbol("outputs"),)))},
        {"key": key, "value": value},
    )


@pytest.mark.parametrize(
    ("turned", "append", "ropes"), [("alike", "rope_append", 0), ("apart", "qkv_append", 2), ("not", "qkv_append", 0)]
)
def test_what_comes_from_three_places_is_joined(turned: str, append: str, ropes: int) -> None:
    after = read_pipeline("fuse-append").run(joined(Model(), turned=turned), observer=NumericsCheck())
    found = counts(after)
    assert (found["concat"], found[append], found["paged_attention"], found["rope"]) == (1, 1, 1, ropes)


def test_states_that_no_append_wrote() -> None:
    context = PassContext()
    read_pipeline("fuse-append").run(joined(Model(), read="old"), context)
    assert context.counts["join-append"] == 0
    assert "want all from one kv_append" in str(context.refusals["join-append"][0])


def taken_apart(b: Model, kind: str) -> Graph:
    """A joint projection of 2 groups of 4 pieces of width 3, with one thing another way."""
    x = b.input("x", F32, (b.tokens, 12))
    y = b.linear(x, b.weight(24, 12), **({"activation": "relu"} if kind == "activation" else {}))
    shape = (2 * b.tokens, 4, 3) if kind == "rows" else (b.tokens, 2, 4, 3)
    pieces = b.reshape(y, shape=shape)
    axis = len(shape) - (1 if kind == "heads" else 2)
    cuts = {"gap": [(0, 2), (3, 4)], "overlap": [(0, 3), (2, 4)], "heads": [(0, 1), (1, 3)]}.get(kind, [(0, 2), (2, 4)])
    parts = {f"part{i}": b.slice(pieces, axis=axis, start=i, stop=j) for i, j in cuts}
    more = {"read": y} if kind == "read" else {"whole": b.exp(pieces)} if kind == "whole" else {}
    return b.graph({**parts, **more})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("activation", "has an activation or a residual"),
        ("rows", "does not keep the rows"),
        ("gap", "want slices that cover an axis"),
        ("overlap", "want slices that cover an axis"),
        ("heads", "parts of heads, as a rotation takes them"),
        ("read", "is also used by a result of the graph"),
        ("whole", "want slices along one axis"),
    ],
)
def test_what_is_not_split(kind: str, reason: str) -> None:
    context = PassContext()
    graph = taken_apart(Model(), kind)
    assert read_pipeline("split-linears").run(graph, context) == graph
    assert reason in str(context.refusals["split-linears"][0])


def test_what_is_split_computes_the_same() -> None:
    after = read_pipeline("split-linears").run(taken_apart(Model(), "right"), observer=NumericsCheck())
    assert counts(after)["linear"] == 2 and counts(after)["slice"] == 0


def normed(b: Model, kind: str) -> Graph:
    """A joint row of 2 query heads, a key and a value of width 4, whose queries and keys are normalised."""
    row, other = (b.input(n, F32, (b.tokens, 16)) for n in ("row", "other"))

    def heads(start: int, count: int, op: Op) -> Value:
        x = b.slice(other if kind == "rows" and count == 1 else row, axis=1, start=start, stop=start + 4 * count)
        if kind == "no norm" and count == 1:
            return b.exp(x)  # type: ignore[no-any-return]
        vectors = [b.weight(4, name=f"{count}.{i}") for i in range(2 if isinstance(op, LayerNorm) else 1)]
        y = b(op, b.reshape(x, shape=(b.tokens, count, 4)), *vectors)
        result: Value = b.reshape(y, shape=(b.tokens, 4 * count))
        return result

    kinds: dict[str, Op] = {"layer norms": LayerNorm(1e-5)}
    first = kinds.get(kind, RmsNorm(1e-5))
    q, k = heads(0, 2, first), heads(8, 1, RmsNorm(1e-6) if kind == "eps" else first)
    v = b.slice(row, axis=1, start=8 if kind == "order" else 12, stop=12 if kind == "order" else 16)
    return b.graph({"out": b.concat(q, k, v, axis=1)})


@pytest.mark.parametrize("kind", ["rms norms", "layer norms"])
def test_norms_of_heads(kind: str) -> None:
    after = read_pipeline("fuse-append").run(normed(Model(), kind), observer=NumericsCheck())
    assert counts(after) == {"norm_heads": 1}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("rows", "not the columns of one row"),
        ("order", "not the columns of one row"),
        ("eps", "queries and keys have different norms"),
        ("no norm", "want a norm of columns of a row, found exp"),
    ],
)
def test_norms_of_heads_that_stay(kind: str, reason: str) -> None:
    context = PassContext()
    read_pipeline("fuse-append").run(normed(Model(), kind), context)
    assert context.counts["norm-heads"] == 0
    assert reason in str(context.refusals["norm-heads"][0])
