"""Attention over a narrow latent: the products that make keys and values of it move to the queries and the results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.attention import Attention
from llmc.ir.ops.linear import Linear
from llmc.ir.ops.rope import Rope
from llmc.ir.ops.shape import Concat, Expand, Reshape, Slice
from llmc.ir.pattern import Match, NoMatch
from llmc.ir.rewrite import Rule
from llmc.passes.base import Pass, PassContext
from llmc.passes.views import reshaped, through_reshapes


@dataclass(frozen=True)
class AbsorbLatent(Pass):
    """`attention` whose keys and values are products with one latent c [t, rank], which is narrower than they are,
    becomes attention of all heads over c itself, which is then what a cache keeps.

    With the key of a head W c beside elements s that all heads share, q·k = q₂·s + (Wᵀ q₁)·c; with its value V c, the
    mixed values are V times the mixed c. W and V are `grouped_linear`s of the queries and of the result.
    """

    name = "absorb-latent"
    stage = "fused"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        return context.rewrite(graph, Absorb())


class _Refused(Exception):
    """Why an attention is left as it is; the NoMatch is the argument."""


@dataclass(frozen=True)
class _Part:
    """Elements `start` to `stop` of every key: `shared` [t, 1, stop - start], or else products with a latent."""

    start: int
    stop: int
    shared: Value | None

    @property
    def width(self) -> int:
        """How many elements they are."""
        return self.stop - self.start


class Absorb(Rule):
    """Keys are a product with a latent, alone or beside shared elements; values are a product with it."""

    name = "absorb-latent"
    roots = (Attention,)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        try:
            return _match(root)
        except _Refused as refused:
            (refusal,) = refused.args
            assert isinstance(refusal, NoMatch)
            return refusal

    def rewrite(self, b: Emitter, match: Match) -> Any:
        op, parts = match.root.op, match.attributes["parts"]
        assert isinstance(op, Attention)
        latent, key_weight, value_weight = (match[name] for name in ("latent", "key_weight", "value_weight"))
        tokens, rank = latent.type.shape
        assert isinstance(rank, int)
        queries = reshaped(b, match["q"], (tokens, op.num_heads, op.head_dim))
        pieces: list[Value] = []
        keys: list[Value] = []
        for part in parts:
            piece = _piece(b, queries, part)
            if part.shared is None:
                flat = reshaped(b, piece, (tokens, op.num_heads * part.width))
                product = b.grouped_linear(flat, b.transpose(key_weight, axes=(0, 2, 1)), groups=op.num_heads)
                absorbed = b.reshape(product, shape=(tokens, op.num_heads, rank))
            else:
                pieces.append(piece)
                keys.append(reshaped(b, match[f"shared{len(pieces)}"], (tokens, part.width)))
        rope = _common_rotation(pieces, keys, op.num_heads)
        tables: tuple[Value, ...] = ()
        if rope is not None:
            turned = through_reshapes(pieces[0]), through_reshapes(keys[0])
            tables = turned[0].node.inputs[1:]
            pieces = [reshaped(b, turned[0].node.inputs[0], pieces[0].type.shape)]
            keys = [reshaped(b, turned[1].node.inputs[0], keys[0].type.shape)]
        width = rank + sum(part.width for part in parts if part.shared is not None)
        q = b.concat(*pieces, absorbed, axis=2) if pieces else absorbed
        q = b.reshape(q, shape=(tokens, op.num_heads * width))
        k = b.concat(*keys, latent, axis=1) if keys else latent
        if rope is not None:
            joined = replace(rope, head_dim=width)
            q, k = b(replace(joined, num_heads=op.num_heads), q, *tables), b(joined, k, *tables)
        narrow = replace(op, num_kv_heads=1, head_dim=width, value_dim=rank)
        rest = (match[f"rest{i}"] for i in range(match.attributes["rest"]))
        return b.grouped_linear(b(narrow, q, k, latent, *rest), value_weight, groups=op.num_heads)


def _piece(b: Emitter, queries: Value, part: _Part) -> Value:
    """The part of queries [t, heads, head_dim], which may be joined of just such parts."""
    start = 0
    for value in queries.node.inputs if queries.op == Concat(2) else ():
        width = value.type.shape[2]
        assert isinstance(width, int)
        if (start, start + width) == (part.start, part.stop):
            return value
        start += width
    result: Value = b.slice(queries, axis=2, start=part.start, stop=part.stop)
    return result


def _common_rotation(pieces: list[Value], keys: list[Value], heads: int) -> Rope | None:
    """The rotation of the key that all heads share, where it is the queries' too; else None.

    Then it is one of the first elements of what is joined, and an append can rotate as it writes.
    """
    if len(pieces) != 1:
        return None
    q, k = through_reshapes(pieces[0]), through_reshapes(keys[0])
    if not isinstance(k.op, Rope) or (k.op.num_heads, k.op.head_dim) != (1, keys[0].type.shape[1]):
        return None
    alike = q.op == replace(k.op, num_heads=heads) and q.node.inputs[1:] == k.node.inputs[1:]
    return k.op if alike else None


def _match(root: Node) -> Match:
    op = root.op
    assert isinstance(op, Attention)
    q, k, v, *rest = root.inputs
    b = Emitter()
    b.loc = root.loc
    heads = _heads(b, k, op.num_kv_heads, op.head_dim)
    parts: list[_Part] = []
    made: list[tuple[Value, Value]] = []
    for value in heads.node.inputs if heads.op == Concat(2) else (heads,):
        start = parts[-1].stop if parts else 0
        width = value.type.shape[2]
        assert isinstance(width, int)
        shared = _shared(value)
        parts.append(_Part(start, start + width, shared))
        if shared is None:
            made.append(_product(b, value, "keys"))
    if len(made) != 1:
        raise _Refused(NoMatch(f"{len(made)} parts of the keys are products with a latent, want one", root, 1))
    (latent, key_weight) = made[0]
    other, value_weight = _product(b, _heads(b, v, op.num_kv_heads, op.value_width), "values")
    if latent != other:
        raise _Refused(NoMatch("keys and values are products with two different values", root, 3))
    if op.num_heads != op.num_kv_heads:
        raise _Refused(NoMatch(f"{op.num_heads} query heads share {op.num_kv_heads} heads of keys", root, 3))
    rank = latent.type.shape[1]
    assert isinstance(rank, int)
    before = op.num_kv_heads * (op.head_dim + op.value_width)
    after = 2 * rank + sum(part.width for part in parts if part.shared is not None)
    if after >= before:
        reason = f"a token's state would take {after} elements, no less than the {before} that it takes now"
        raise _Refused(NoMatch(reason, root, 4))
    operands = {"q": q, "latent": latent, "key_weight": key_weight, "value_weight": value_weight}
    operands |= {f"rest{i}": value for i, value in enumerate(rest)}
    operands |= {f"shared{i}": value for i, value in enumerate((p.shared for p in parts if p.shared), 1)}
    return Match(root, operands, {"parts": parts, "rest": len(rest)}, frozenset([root]), root.results)


def _heads(b: Emitter, value: Value, count: int, width: int) -> Value:
    """Keys or values as [t, count, width]."""
    return reshaped(b, value, (value.type.shape[0], count, width))


def _shared(value: Value) -> Value | None:
    """The [t, 1, width] that all heads of a [t, heads, width] repeat; None where they may differ."""
    if not isinstance(value.op, Expand):
        return None
    (narrow,) = value.node.inputs
    return narrow if narrow.type.shape == (value.type.shape[0], 1, value.type.shape[2]) else None


def _product(b: Emitter, value: Value, name: str) -> tuple[Value, Value]:
    """The x [t, rank] and the weight [heads, width, rank] of a value [t, heads, width] that is their product.

    Its elements are some outputs of a linear, in some shape: the weight's rows are cut and shaped as they are.
    """
    views: list[Value] = []
    while isinstance(value.op, Reshape | Slice):
        views.append(value)
        (value,) = value.node.inputs
    if not isinstance(value.op, Linear):
        raise _Refused(NoMatch(f"{name} are no products with a latent: found {value.op.name}", value.node, 2))
    if value.op != Linear():
        raise _Refused(NoMatch(f"the product that makes {name} is {value.op}, want a plain one", value.node, 2))
    latent, weight = value.node.inputs
    tokens, rank = latent.type.shape
    for view in reversed(views):
        if view.type.shape[0] != tokens:
            raise _Refused(NoMatch(f"{view.type} does not have the tokens first", view.node, 2))
        if isinstance(view.op, Slice):
            weight = b.one(replace(view.op, axis=view.op.axis - 1), weight)
        else:
            weight = b.reshape(weight, shape=(*view.type.shape[1:], rank))
    return latent, weight
