"""Random graphs of motifs, right and nearly right, through every pass: what they compute must not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.ir.graph import Graph
from llmc.ir.op import Value
from llmc.ir.ops.attention import Attention
from llmc.ir.ops.elementwise import GeluErf, GeluTanh, Silu
from llmc.ir.ops.norm import LayerNorm, RmsNorm
from llmc.ir.ops.rope import Rope
from llmc.ir.text import parse
from llmc.ir.types import DType
from llmc.passes.base import PassContext
from llmc.passes.observe import NumericsCheck, Verifier, together
from llmc.passes.pipelines import COMMON, read_pipeline
from tests.passes.graphs import F32, Model

WIDTH = 8
SINGLE = ["canonicalize", "constant-fold", "raise-linear", "pack-linears", "fuse-norm", "fuse-rope", "fuse-attention"]
SINGLE += ["fuse-mlp", "plan-memory", "fuse-append", "raise-linear,fuse-mlp,pack-linears", "raise-linear,pack-linears"]
SINGLE += ["raise-linear,fuse-residual", "raise-linear,fuse-norm,fuse-residual,fuse-mlp,pack-linears"]


class Drawn:
    """A graph under construction: values of shape [tokens, 8], of which any may be read again."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw
        weights = draw(st.sampled_from([F32, DType.BF16]))
        self.b = Model(weights)
        self.values: list[Value] = [self.b.input("x", F32, (self.b.tokens, WIDTH))]
        self.count = 0

    def yes(self) -> bool:
        """A coin."""
        return bool(self.draw(st.booleans()))

    def value(self) -> Value:
        """One of the values so far, mostly a late one."""
        at = self.draw(st.integers(0, len(self.values) - 1))
        chosen: Value = self.values[max(at, len(self.values) - 3) if self.yes() else at]
        return chosen

    def swapped(self, op: Callable[..., Value], x: Value, y: Value) -> Value:
        """A commutative op with its operands in either order."""
        return op(x, y) if self.yes() else op(y, x)

    def linear(self, x: Value, bias: bool | None = None) -> Value:
        """A projection to 8 columns, in one of the ways that importers write it."""
        self.count += 1
        return self.b.project(f"w{self.count}", x, WIDTH, self.yes() if bias is None else bias, in_out=self.yes())

    def motif(self) -> None:
        """One more piece of a model."""
        name = self.draw(st.sampled_from(sorted(MOTIFS)))
        with self.b.at(self.draw(st.sampled_from(["a.0", "a.1", "b", "b.0.c"]))):
            self.values.append(MOTIFS[name](self))


def residual(d: Drawn) -> Value:
    return d.swapped(d.b.add, d.value(), d.value())


def norm(d: Drawn) -> Value:
    d.count += 1
    x = residual(d) if d.yes() else d.value()
    weight = d.b.weight(WIDTH, name=f"n{d.count}") if d.yes() else d.value()
    if d.yes():
        return d.b.primitive(LayerNorm(1e-3), x, weight, d.b.weight(WIDTH, name=f"m{d.count}"))
    return d.b.primitive(RmsNorm(1e-3), x, weight)


def gated(d: Drawn) -> Value:
    x = d.value()
    bias = d.yes()
    gate = d.linear(x, bias)
    up = d.linear(x if d.yes() else d.value(), bias)
    act = d.draw(st.sampled_from([Silu(), GeluTanh(), GeluErf()]))
    return d.swapped(d.b.mul, d.b.primitive(act, gate), up)


def activation(d: Drawn) -> Value:
    act = d.draw(st.sampled_from([Silu(), GeluTanh(), GeluErf()]))
    return d.b.primitive(act, d.linear(d.value()) if d.yes() else d.value())


def rotation(d: Drawn) -> Value:
    width = d.draw(st.sampled_from([2, 4]))
    cos, sin = d.b.table(width, d.draw(st.sampled_from([1.0, 0.5])))
    return d.b.primitive(Rope(2, 4, width, d.draw(st.sampled_from(["half", "interleaved"]))), d.value(), cos, sin)


def attention(d: Drawn) -> Value:
    """Attention, with its keys maybe grouped, the scale before or after, or the mask the wrong way round."""
    b = d.b
    q, k, v = ((d.linear(d.value()) if d.yes() else d.value()) for _ in range(3))
    if d.yes():
        narrow = [b.slice(x, axis=1, start=0, stop=4) for x in (k, v)]
        return b.primitive(Attention(2, 1, 4, 0.3), q, *narrow, b.positions)
    t = b.tokens
    heads = [b.transpose(b.reshape(x, shape=(t, 2, 4)), axes=(1, 0, 2)) for x in (q, k, v)]
    if d.yes():
        heads[0] = b.mul_scalar(heads[0], value=0.7)
    scores = b.matmul(heads[0], b.transpose(heads[1], axes=(0, 2, 1)))
    if d.yes():
        scores = b.mul_scalar(scores, value=0.3)
    row, column = b.reshape(b.positions, shape=(t, 1)), b.reshape(b.positions, shape=(1, t))
    visible = b.greater_equal(row, column) if d.yes() else b.greater_equal(column, row)
    weights = b.softmax(b.mask(scores, visible, value=d.draw(st.sampled_from([-math.inf, -1e9, -1e31, -2.0]))))
    mixed = b.transpose(b.matmul(weights, heads[2]), axes=(1, 0, 2))
    result: Value = b.reshape(mixed, shape=(t, WIDTH))
    return result


def views(d: Drawn) -> Value:
    """Reshapes, transposes, slices and concatenations that lead back to [tokens, 8]."""
    b, x = d.b, d.value()
    for _ in range(d.draw(st.integers(1, 4))):
        match d.draw(st.integers(0, 4)):
            case 0:
                axes = d.draw(st.sampled_from([(0, 2, 1), (0, 1, 2), (2, 0, 1)]))
                y = b.transpose(b.reshape(x, shape=(b.tokens, 2, 4)), axes=axes)
                back = tuple(axes.index(i) for i in range(3)) if d.yes() or axes == (2, 0, 1) else (0, 1, 2)
                x = b.reshape(b.transpose(y, axes=back), shape=(b.tokens, WIDTH))
            case 1:
                cut = d.draw(st.integers(1, WIDTH - 1))
                parts = [b.slice(x, axis=1, start=0, stop=cut), b.slice(x, axis=1, start=cut, stop=WIDTH)]
                x = b.concat(*(parts if d.yes() else parts[::-1]), axis=1)
            case 2:
                wide = b.concat(x, d.value(), axis=1)
                start = d.draw(st.integers(0, WIDTH))
                x = b.slice(wide, axis=1, start=start, stop=start + WIDTH)
            case 3:
                x = b.concat(b.slice(b.slice(x, axis=1, start=2, stop=8), axis=1, start=0, stop=4, step=2), x, axis=1)
                x = b.slice(x, axis=1, start=0, stop=WIDTH)
            case _:
                x = b.cast(b.cast(x, dtype=d.draw(st.sampled_from([F32, DType.F64, DType.F16]))), dtype=F32)
    return x


def arithmetic(d: Drawn) -> Value:
    b, x = d.b, d.value()
    constant = b.constant(d.draw(st.sampled_from([2.0, [0.5], [[1.0]], [1.0, 2.0] * 4])), F32)
    match d.draw(st.integers(0, 7)):
        case 0:
            return d.swapped(b.add, b.neg(x), d.value())
        case 1:
            return b.sub(x, b.neg(d.value()))  # type: ignore[no-any-return]
        case 2:
            return b.mul(b.neg(x), b.neg(d.value()))  # type: ignore[no-any-return]
        case 3:
            return d.swapped(b.mul, x, constant)
        case 4:
            return b.div(b.sub(x, constant), constant)  # type: ignore[no-any-return]
        case 5:
            return b.pow_scalar(x, exponent=d.draw(st.sampled_from([1.0, 2.0, 3.0])))  # type: ignore[no-any-return]
        case 6:
            return b.add_scalar(b.mul_scalar(x, value=d.draw(st.sampled_from([1.0, 0.5]))), value=0.0)  # type: ignore[no-any-return]
        case _:
            return b.add(x, b.mul(constant, b.exp(constant)))  # type: ignore[no-any-return]


MOTIFS: dict[str, Callable[[Drawn], Value]] = {
    "activation": activation,
    "arithmetic": arithmetic,
    "attention": attention,
    "gated": gated,
    "linear": lambda d: d.linear(d.value()),
    "norm": norm,
    "residual": residual,
    "rotation": rotation,
    "views": views,
}


@st.composite
def graphs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Graph:
    """A graph of one to six motifs; besides the last value, an earlier one may be an output too."""
    d = Drawn(draw)
    for _ in range(draw(st.integers(1, 6))):
        d.motif()
    last = d.b.mul_scalar(d.values[-1], value=0.5)
    outputs = {"out": last}
    if d.yes():
        outputs["other"] = d.value()
    return d.b.graph(outputs)


def check(pipeline: str, graph: Graph) -> None:
    context = PassContext()
    after = read_pipeline(pipeline).run(graph, context, together(Verifier(), NumericsCheck()))
    assert parse(str(after), after.constants) == after


@pytest.mark.parametrize("pipeline", SINGLE)
@settings(max_examples=20)
@given(graph=graphs())
def test_each_pass_keeps_the_meaning(pipeline: str, graph: Graph) -> None:
    check(pipeline, graph)


@settings(max_examples=100)
@given(graph=graphs())
def test_the_pipeline_keeps_the_meaning(graph: Graph) -> None:
    check(str(COMMON), graph)


@settings(max_examples=30)
@given(graph=graphs(), limit=st.integers(0, 40))
def test_a_limited_pipeline_keeps_the_meaning(graph: Graph, limit: int) -> None:
    COMMON.run(graph, PassContext(limit), together(Verifier(), NumericsCheck()))
