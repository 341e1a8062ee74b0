"""Blocks write what the fused ops decompose to, so that fusion finds it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llmc.architectures.context import ACTIVATIONS, Context, Initial
from llmc.architectures.norms import LayerNormBlock, RmsNormBlock
from llmc.ir.builder import Builder
from llmc.ir.graph import Graph
from llmc.ir.op import Value
from llmc.ir.ops.linear import Linear
from llmc.ir.ops.norm import LayerNorm, RmsNorm
from llmc.ir.types import DType, symbol


class Everything:
    """Parameters that are always there, in one dtype."""

    def __init__(self, dtype: DType) -> None:
        self.dtype = dtype

    def declare(self, name: str, shape: tuple[int, ...], initial: Initial) -> tuple[str, DType]:
        return name, self.dtype

    def tie(self, name: str, to: str) -> str:
        return to


def build(body: Callable[[Context, Value], Value], dtype: DType = DType.F32) -> Graph:
    b = Builder()
    tokens = symbol("tokens", 1, 16)
    c = Context(b, Everything(dtype), DType.F32, b.input("positions", DType.I32, (tokens,)))
    return b.graph({"y": body(c, b.input("x", DType.F32, (tokens, 8)))})


def in_place(name: str, body: Callable[[Context, Value], Value]) -> Callable[[Context, Value], Value]:
    def placed(c: Context, x: Value) -> Value:
        with c.b.at(name):
            return body(c, x)

    return placed


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_norms(dtype: DType) -> None:
    def rms(c: Context, x: Value) -> Value:
        return RmsNorm(1e-5).decompose(c.b, x, c.vector(8, "ones", "weight"))

    def layer(c: Context, x: Value) -> Value:
        return LayerNorm(1e-5).decompose(c.b, x, c.vector(8, "ones", "weight"), c.vector(8, "small", "bias"))

    assert build(RmsNormBlock("n", 8, 1e-5), dtype) == build(in_place("n", rms), dtype)
    assert build(LayerNormBlock("n", 8, 1e-5), dtype) == build(in_place("n", layer), dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16])
def test_linear(bias: bool, dtype: DType) -> None:
    def fused(c: Context, x: Value) -> Value:
        given = [c.weight((6, 8)), *([c.weight((6,), "small", "bias")] if bias else [])]
        return Linear(bias=bias).decompose(c.b, x, *given)

    assert build(lambda c, x: c.linear("q", x, 6, bias, False), dtype) == build(in_place("q", fused), dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_primitive(name: str) -> None:
    graph = build(lambda c, x: c.activate(name, x))
    assert {n.op.stage for n in graph.nodes} == {"primitive"}
    expected = ACTIVATIONS[name]()
    written = build(
        in_place("act_fn", lambda c, x: expected.decompose(c.b, x) if expected.decomposes else c.b(expected, x))
    )
    assert graph == written
