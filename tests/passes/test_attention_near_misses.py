"""What is nearly attention and must not be: nothing fires, and the refusal says why."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from llmc.ir.graph import Graph
from llmc.ir.op import Value
from llmc.ir.ops.attention import Attention
from llmc.ir.types import DType
from llmc.ir.verify import verify
from llmc.passes.base import PassContext
from llmc.passes.pipelines import read_pipeline
from tests.passes.graphs import F32, Model, counts


def attend(
    b: Model,
    mask: Callable[[Value, Value], Value] | None = None,
    value: float = -math.inf,
    bias: Callable[[Value, Value], Value] | None = None,
    scores: Callable[[Value], Value] | None = None,
    sinks: tuple[int, ...] | None = None,
) -> Graph:
    """Attention over two heads, with one thing another way."""
    t = b.tokens
    heads = [b.transpose(b.reshape(b.input(n, F32, (t, 8)), shape=(t, 2, 4)), axes=(1, 0, 2)) for n in ("q", "k", "v")]
    product = b.matmul(heads[0], b.transpose(heads[1], axes=(0, 2, 1)))
    row, column = b.reshape(b.positions, shape=(t, 1)), b.reshape(b.positions, shape=(1, t))
    if bias is not None:
        product = b.add(product, bias(row, column))
    if scores is not None:
        product = scores(product)
    if mask is not None:
        product = b.mask(product, mask(row, column), value=value)
    weights = b.softmax(product) if sinks is None else b.sink_softmax(product, b.weight(*sinks, name="sinks"))
    mixed = b.matmul(weights, heads[2])
    return b.graph({"out": b.reshape(b.transpose(mixed, axes=(1, 0, 2)), shape=(t, 8))})


def both(second: Callable[[Model, Value, Value], Value]) -> Callable[[Model], Graph]:
    """Attention whose mask has a second condition, of query and key."""

    def make(b: Model) -> Graph:
        return attend(b, lambda row, column: b.logical_and(b.greater_equal(row, column), second(b, row, column)))

    return make


def sloped(
    slopes: Callable[[Model], Value],
    places: Callable[[Model, Value, Value], Value],
    sinks: tuple[int, ...] | None = None,
) -> Callable[[Model], Graph]:
    """Attention with slopes times something."""

    def make(b: Model) -> Graph:
        def bias(row: Value, column: Value) -> Value:
            result: Value = b.mul(slopes(b), b.cast(places(b, row, column), dtype=F32))
            return result

        return attend(b, b.greater_equal, bias=bias, sinks=sinks)

    return make


def slope(b: Model) -> Value:
    """A slope for each of two heads."""
    return b.weight(2, 1, 1, name="slopes")


def capped_after_bias(b: Model) -> Graph:
    def bias(row: Value, column: Value) -> Value:
        result: Value = b.mul(slope(b), b.cast(column, dtype=F32))
        return result

    return attend(b, b.greater_equal, bias=bias, scores=b.tanh)


def unequal(b: Model) -> Graph:
    """The product of two biases by position."""

    def bias(row: Value, column: Value) -> Value:
        place = b.cast(column, dtype=F32)
        result: Value = b.mul(slope(b), b.add(b.mul(slope(b), place), place))
        return result

    return attend(b, b.greater_equal, bias=bias)


def grouped(b: Model, tiled: bool) -> Graph:
    """Queries of 4 heads of width 4 over keys of 2."""
    t = b.tokens
    q = b.input("q", F32, (t, 16))
    k, v = (b.input(n, F32, (t, 8)) for n in ("k", "v"))

    def heads(x: Value, count: int) -> Value:
        result: Value = b.transpose(b.reshape(x, shape=(t, count, 4)), axes=(1, 0, 2))
        return result

    def wide(x: Value) -> Value:
        narrow, shape = ((1, 2, t, 4), (2, 2, t, 4)) if tiled else ((2, 1, t, 4), (2, 2, t, 4))
        result: Value = b.reshape(b.expand(b.reshape(heads(x, 2), shape=narrow), shape=shape), shape=(4, t, 4))
        return result

    scores = b.matmul(heads(q, 4), b.transpose(wide(k), axes=(0, 2, 1)))
    row, column = b.reshape(b.positions, shape=(t, 1)), b.reshape(b.positions, shape=(1, t))
    weights = b.softmax(b.mask(scores, b.greater_equal(row, column), value=-math.inf))
    mixed = b.transpose(b.matmul(weights, wide(v)), axes=(1, 0, 2))
    return b.graph({"out": b.reshape(mixed, shape=(t, 16))})


def weights_wanted(b: Model) -> Graph:
    """Attention whose weights leave the graph."""
    q, k, v = (b.input(n, F32, (b.tokens, 8)) for n in ("q", "k", "v"))
    out = b.primitive(Attention(2, 2, 4, 0.5), q, k, v, b.positions)
    softmax = out.node.inputs[0].node.inputs[0].node.inputs[0]
    assert softmax.op.name == "softmax"
    return b.graph({"out": out, "weights": softmax})


def other_positions(b: Model) -> Graph:
    other = b.input("other", DType.I32, (b.tokens,))
    row = b.reshape(other, shape=(b.tokens, 1))
    return attend(b, mask=lambda _, column: b.greater_equal(row, column))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (attend, "the scores are not masked"),
        (lambda b: attend(b, mask=lambda r, c: b.greater_equal(c, r)), "not causal: tokens would see those after them"),
        (lambda b: attend(b, mask=b.greater_equal, value=-10000.0), "masked scores become -10000.0"),
        (other_positions, "does not compare one vector of positions with itself"),
        (lambda b: grouped(b, tiled=True), "want each head repeated beside itself"),
        (weights_wanted, "its inner value is also used by a result of the graph"),
        (lambda b: attend(b, b.greater_equal, scores=b.exp), "want the product of queries and keys, found exp"),
        (both(lambda b, r, c: b.greater_equal(c, b.mul_scalar(r, value=0.5))), "no bound on the distance"),
        (both(lambda b, r, c: b.greater_equal(c, b.add_scalar(r, value=1.0))), "hides a token from itself"),
        (both(lambda b, r, c: b.greater_equal(b.add_scalar(r, value=-1.0), c)), "hides a token from itself"),
        (both(lambda b, r, c: b.greater_equal(b.mul(c, c), r)), "compares something else than positions: mul"),
        (both(lambda b, r, c: b.input("seen", DType.BOOL, (b.tokens, b.tokens))), "is no comparison of positions"),
        (lambda b: attend(b, lambda r, c: b.greater_equal(b.add_scalar(r, value=2.0), c)), "is not causal"),
        (
            lambda b: attend(b, b.greater_equal, bias=lambda r, c: b.exp(b.cast(c, dtype=F32))),
            "exp is added to the scores, which is neither a mask nor slope",
        ),
        (capped_after_bias, "add stands before the cap of the scores"),
        (lambda b: attend(b, b.greater_equal, scores=lambda x: b.tanh(b.tanh(x))), "found tanh"),
        (sloped(lambda b: b.input("slopes", F32, (2, b.tokens, 1)), lambda b, r, c: c), "mul is added to the scores"),
        (sloped(slope, lambda b, r, c: r), "no slope times the positions of keys"),
        (sloped(slope, lambda b, r, c: c, sinks=(2, 1, 1)), "beside sinks a bias must be slope times (key - query)"),
        (unequal, "mul is added to the scores"),
        (lambda b: attend(b, b.greater_equal, sinks=(1, 1)), "want one for each of 2 heads"),
    ],
)
def test_attention(make: Callable[[Model], Graph], reason: str) -> None:
    graph = make(Model())
    verify(graph)
    context = PassContext()
    after = read_pipeline("fuse-attention").run(graph, context)
    assert context.counts == {"attention": 0}
    assert after == graph
    assert reason in str(context.refusals["attention"][0])


def test_grouped_attention_is_recognised_where_it_is_right() -> None:
    assert counts(read_pipeline("fuse-attention,canonicalize").run(grouped(Model(), tiled=False))) == {"attention": 1}
