"""Attention is recognised by what it means: every way to write a scale, a cap, a window, a bias or a mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from llmc.ir.graph import Graph
from llmc.ir.op import Op, Value
from llmc.ir.ops.attention import Attention
from llmc.ir.types import DType
from llmc.passes.observe import NumericsCheck
from llmc.passes.pipelines import read_pipeline
from tests.passes.graphs import F32, Model

I32 = DType.I32
LOWEST = float(np.finfo(np.float32).min)


def recognised(graph: Graph) -> Attention:
    """The attention that a graph is; the two compute the same."""
    after = read_pipeline("constant-fold,fuse-attention,constant-fold,canonicalize").run(
        graph, observer=NumericsCheck()
    )
    found = [n.op for n in after.nodes if isinstance(n.op, Attention)]
    assert len(found) == 1
    return found[0]


class Parts:
    """Queries, keys and values of 4 heads over 2, and positions as columns and rows of a mask."""

    def __init__(self, value_width: int = 8) -> None:
        self.b = Model()
        self.value_width = value_width
        t = self.b.tokens
        self.row, self.column = (self.b.reshape(self.b.positions, shape=s) for s in ((t, 1), (1, t)))
        self.causal = self.b.greater_equal(self.row, self.column)
        self.q = self.heads("q", 4, 8)
        self.k, self.v = self.wide(self.heads("k", 2, 8)), self.wide(self.heads("v", 2, value_width))

    def heads(self, name: str, count: int, width: int) -> Value:
        """An input [t, count · width] as [count, t, width]."""
        x = self.b.input(name, F32, (self.b.tokens, count * width))
        result: Value = self.b.transpose(self.b.reshape(x, shape=(self.b.tokens, count, width)), axes=(1, 0, 2))
        return result

    def wide(self, x: Value) -> Value:
        """Each head twice."""
        t, width = x.type.shape[1:]
        expanded = self.b.expand(self.b.reshape(x, shape=(2, 1, t, width)), shape=(2, 2, t, width))
        result: Value = self.b.reshape(expanded, shape=(4, t, width))
        return result

    def product(self) -> Value:
        """Queries times keys."""
        result: Value = self.b.matmul(self.q, self.b.transpose(self.k, axes=(0, 2, 1)))
        return result

    def out(self, weights: Value) -> Graph:
        """The graph of weights times values."""
        mixed = self.b.transpose(self.b.matmul(weights, self.v), axes=(1, 0, 2))
        return self.b.graph({"out": self.b.reshape(mixed, shape=(self.b.tokens, 4 * self.value_width))})

    def masked(self, scores: Value, visible: Value | None = None) -> Graph:
        """Softmax of scores where they are visible."""
        return self.out(self.b.softmax(self.b.mask(scores, visible or self.causal, value=-math.inf)))

    def number(self, value: float, *shape: int) -> Value:
        """A constant of one element."""
        return self.b.constant(np.full(shape, value), F32)


@pytest.mark.parametrize(
    "op",
    [
        Attention(4, 2, 8, 0.5),
        Attention(4, 2, 8, 0.5, window=3, soft_cap=20.0),
        Attention(4, 2, 8, 0.5, alibi=True, value_dim=6),
        Attention(4, 2, 8, 0.5, sinks=True, window=5),
        Attention(4, 4, 8, 0.5, alibi=True, sinks=True, soft_cap=3.0, window=7, value_dim=2),
    ],
    ids=str,
)
def test_what_the_op_decomposes_to(op: Attention) -> None:
    b = Model()
    widths = {"q": 32, "k": 8 * op.num_kv_heads, "v": op.value_width * op.num_kv_heads}
    given = [b.input(n, F32, (b.tokens, width)) for n, width in widths.items()]
    vectors = [b.weight(4, name=name) for name in op.per_head]
    found = recognised(b.graph({"out": b.primitive(op, *given, b.positions, *vectors)}))
    assert found.scale == pytest.approx(op.scale, rel=1e-12)
    assert {**vars(found), "scale": op.scale} == vars(op)


SCALES: dict[str, Callable[[Parts], Graph]] = {
    "on queries": lambda p: p.masked(p.b.matmul(p.b.mul_scalar(p.q, value=0.5), p.b.transpose(p.k, axes=(0, 2, 1)))),
    "on keys": lambda p: p.masked(
        p.b.matmul(p.q, p.b.div(p.b.transpose(p.k, axes=(0, 2, 1)), p.number(2.0, 1, 1))),
    ),
    "a division": lambda p: p.masked(p.b.div(p.product(), p.number(2.0))),
    "a division by a constant of rank 3": lambda p: p.masked(p.b.div(p.product(), p.number(2.0, 1, 1, 1))),
    "after the mask": lambda p: p.out(
        p.b.softmax(p.b.mul_scalar(p.b.mask(p.product(), p.causal, value=-math.inf), value=0.5))
    ),
    "twice": lambda p: p.masked(p.b.mul_scalar(p.b.mul_scalar(p.product(), value=0.25), value=2.0)),
    "after views of four axes": lambda p: p.out(
        p.b.reshape(
            p.b.softmax(
                p.b.mask(
                    p.b.mul_scalar(p.b.reshape(p.product(), shape=(1, 4, p.b.tokens, p.b.tokens)), value=0.5),
                    p.b.reshape(p.causal, shape=(1, 1, p.b.tokens, p.b.tokens)),
                    value=LOWEST,
                )
            ),
            shape=(4, p.b.tokens, p.b.tokens),
        )
    ),
}


@pytest.mark.parametrize("name", sorted(SCALES))
def test_scales(name: str) -> None:
    assert recognised(SCALES[name](Parts())) == Attention(4, 2, 8, 0.5)


@pytest.mark.parametrize(("before", "cap", "after"), [(0.5, 4.0, 1.0), (0.25, 4.0, 2.0), (-0.5, -4.0, 1.0)])
def test_caps(before: float, cap: float, after: float) -> None:
    """after · cap · tanh(before · product / cap)."""
    p = Parts()
    inner = p.b.div(p.b.mul_scalar(p.product(), value=before), p.number(cap))
    capped = p.b.mul_scalar(p.b.mul(p.b.tanh(inner), p.number(cap)), value=after)
    assert recognised(p.masked(capped)) == Attention(4, 2, 8, before * after, soft_cap=abs(cap) * after)


Condition = Callable[[Parts], Value]


def _shifted(p: Parts, value: Value, by: int) -> Value:
    result: Value = p.b.add_scalar(value, value=float(by))
    return result


WINDOWS: dict[str, Condition] = {
    "a shifted column": lambda p: p.b.greater_equal(_shifted(p, p.column, 4), p.row),
    "a shifted row": lambda p: p.b.greater_equal(p.column, _shifted(p, p.row, -4)),
    "a constant added": lambda p: p.b.greater_equal(p.b.add(p.column, p.b.constant([[4]], I32)), p.row),
    "more than": lambda p: p.b.greater_equal(p.column, _shifted(p, p.b.sub(p.row, p.b.constant(5, I32)), 1)),
    "a difference": lambda p: p.b.greater_equal(p.b.constant([[4]], I32), p.b.sub(p.row, p.column)),
    "a negative difference": lambda p: p.b.greater_equal(
        _shifted(p, p.b.neg(p.b.sub(p.row, p.column)), 4), p.b.constant([[0]], I32)
    ),
    "of floats": lambda p: p.b.greater_equal(
        p.b.add_scalar(p.b.cast(p.column, dtype=F32), value=4.5), p.b.cast(p.row, dtype=F32)
    ),
    "positions shifted before they are a column": lambda p: p.b.greater_equal(
        p.b.reshape(_shifted(p, p.b.positions, 4), shape=(1, p.b.tokens)), p.row
    ),
    "transposed": lambda p: p.b.transpose(
        p.b.greater_equal(_shifted(p, p.row, 4), p.column),
        axes=(1, 0),
    ),
}


@pytest.mark.parametrize("order", ["first", "second", "beside more", "another mask"])
@pytest.mark.parametrize("name", sorted(WINDOWS))
def test_windows(name: str, order: str) -> None:
    p = Parts()
    window = WINDOWS[name](p)
    match order:
        case "first":
            visible = p.b.logical_and(window, p.causal)
        case "second":
            visible = p.b.logical_and(p.causal, window)
        case "beside more":
            wider = p.b.greater_equal(_shifted(p, p.column, 6), p.row)
            true = p.b.constant([[True]], DType.BOOL)
            visible = p.b.logical_and(p.b.logical_and(wider, p.causal), p.b.logical_and(window, true))
        case _:
            scores = p.b.mask(p.product(), p.causal, value=-math.inf)
            assert recognised(p.masked(scores, window)) == Attention(4, 2, 8, 1.0, window=5)
            return
    assert recognised(p.masked(p.product(), visible)) == Attention(4, 2, 8, 1.0, window=5)


@pytest.mark.parametrize(("window", "kept"), [(63, 63), (64, 0), (65, 0)])
def test_a_window_that_holds_the_longest_sequence_is_dropped(window: int, kept: int) -> None:
    p = Parts()
    near = p.b.greater_equal(_shifted(p, p.column, window - 1), p.row)
    assert recognised(p.masked(p.product(), p.b.logical_and(p.causal, near))).window == kept


def _slopes(p: Parts, constant: bool = False) -> Value:
    if constant:
        return p.b.constant(np.array([0.5, 0.25, 0.125, 0.0625]).reshape(4, 1, 1), F32)
    result: Value = p.b.reshape(p.b.weight(4, name="slopes"), shape=(4, 1, 1))
    return result


def _floats(p: Parts, x: Value) -> Value:
    result: Value = p.b.cast(x, dtype=F32)
    return result


def _additive(p: Parts, visible: Value, rest: Value | None = None) -> Value:
    zeros = p.b.expand(p.number(0.0), shape=(p.b.tokens, p.b.tokens))
    result: Value = p.b.mask(zeros if rest is None else rest, visible, value=LOWEST)
    return result


BIASES: dict[str, Callable[[Parts], Graph]] = {
    "distances": lambda p: p.masked(p.b.add(p.product(), p.b.mul(_slopes(p), _floats(p, p.b.sub(p.column, p.row))))),
    "keys": lambda p: p.masked(p.b.add(p.product(), p.b.mul(_floats(p, p.column), _slopes(p)))),
    "constant slopes": lambda p: p.masked(p.b.add(p.b.mul(_floats(p, p.column), _slopes(p, True)), p.product())),
    "scaled": lambda p: p.masked(
        p.b.mul_scalar(p.b.add(p.product(), p.b.mul(_floats(p, p.column), _slopes(p))), value=0.5)
    ),
    "from the last": lambda p: p.masked(
        p.b.add(p.product(), p.b.mul(_slopes(p), p.b.add_scalar(_floats(p, p.column), value=-63.0)))
    ),
    "with the mask": lambda p: p.out(
        p.b.softmax(p.b.add(p.product(), p.b.add(p.b.mul(_slopes(p), _floats(p, p.column)), _additive(p, p.causal))))
    ),
    "masked itself": lambda p: p.out(
        p.b.softmax(p.b.add(p.product(), _additive(p, p.causal, p.b.mul(_slopes(p), _floats(p, p.column)))))
    ),
    "one slope for all": lambda p: p.masked(
        p.b.add(p.product(), p.b.mul_scalar(_floats(p, p.b.sub(p.column, p.row)), value=0.5))
    ),
}


@pytest.mark.parametrize("name", sorted(BIASES))
def test_biases_by_position(name: str) -> None:
    scale = 0.5 if name == "scaled" else 1.0
    assert recognised(BIASES[name](Parts())) == Attention(4, 2, 8, scale, alibi=True)


def test_additive_masks() -> None:
    """Lowest numbers are added, for causality and for a window apart."""
    p = Parts(value_width=6)
    near = p.b.greater_equal(_shifted(p, p.column, 4), p.row)
    scores = p.b.add(p.b.add(_additive(p, p.causal), p.b.mul_scalar(p.product(), value=0.5)), _additive(p, near))
    assert recognised(p.out(p.b.softmax(scores))) == Attention(4, 2, 8, 0.5, window=5, value_dim=6)


def test_sinks_beside_distances() -> None:
    p = Parts()
    biased = p.b.add(p.product(), p.b.mul(_slopes(p), _floats(p, p.b.sub(p.column, p.row))))
    sinks = p.b.reshape(p.b.weight(4, name="sinks"), shape=(4, 1, 1))
    weights = p.b.sink_softmax(p.b.mask(biased, p.causal, value=-math.inf), sinks)
    assert recognised(p.out(weights)) == Attention(4, 2, 8, 1.0, alibi=True, sinks=True)


def test_every_kind_of_operand_is_paged() -> None:
    """Attributes and vectors of heads go on to paged attention, and values of another width into their state."""
    op: Op = Attention(4, 2, 8, 0.5, window=3, soft_cap=20.0, alibi=True, sinks=True, value_dim=6)
    b = Model()
    x = b.embedding(b.token_ids, b.param("embed.weight", F32, (11, 32)), dtype=F32)
    with b.at("attention"):
        q, k, v = (b.project(n, x, width) for n, width in (("query", 32), ("key", 16), ("value", 12)))
        vectors = [b.weight(4, name=name) for name in ("slopes", "sinks")]
        y = b.project("output", b.primitive(op, q, k, v, b.positions, *vectors), 32)
    graph = b.graph({"logits": b.project("head", y, 11)})
    step = read_pipeline("raise-linear,fuse-attention,paged-kv{block_size=4, dtype=f32}").run(
        graph, observer=NumericsCheck()
    )
    (paged,) = (n.op for n in step.nodes if n.op.name == "paged_attention")
    assert vars(paged) == {**vars(op), "scaled": False, "scale": pytest.approx(0.5, rel=1e-12)}
    assert [str(v.type) for v in step.states] == ["f32[num_blocks, 2, 8, 4]", "f32[num_blocks, 2, 4, 6]"]
