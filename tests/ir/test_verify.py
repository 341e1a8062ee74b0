"""Each rule of the verifier, by a graph that breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmc.ir.builder import Builder
from llmc.ir.errors import LlmcError, VerificationError
from llmc.ir.graph import Graph, Input, Param, State, StateInput
from llmc.ir.op import Node, Value
from llmc.ir.ops.elementwise import Exp
from llmc.ir.text import parse
from llmc.ir.types import DType, TensorType, symbol
from llmc.ir.verify import verify
from tests.passes.graphs import rotary_model

F32 = DType.F32
KEY = State("key", "paged_kv", F32, (symbol("blocks"), 1, 2, 4))
VALUE = State("value", "paged_kv", F32, (symbol("blocks"), 1, 4, 2))


def appended(b: Builder, key: Value, value: Value) -> tuple[Value, Value]:
    k, slots = b.input("k", F32, (3, 2)), b.input("slots", DType.I32, (3,))
    made: tuple[Value, Value] = b.kv_append(k, k, slots, key, value, num_kv_heads=1, head_dim=2)
    return made


def stateful() -> tuple[Builder, Value, Value]:
    b = Builder("g")
    return b, b.state(KEY), b.state(VALUE)


def test_what_is_well_formed_passes() -> None:
    verify(rotary_model(), "primitive")
    b, key, value = stateful()
    key, value = appended(b, *appended(b, key, value))
    verify(b.graph({}, {"key": key, "value": value}))
    b, _, _ = stateful()
    verify(b.graph({}))


@pytest.mark.parametrize(
    ("op", "stage", "allowed"),
    [("exp", "primitive", True), ("silu", "primitive", False), ("silu", "fused", True), ("silu", "step", True)],
)
def test_stages(op: str, stage: str, allowed: bool) -> None:
    b = Builder("g")
    graph = b.graph({"y": getattr(b, op)(b.input("x", F32, (2,)))})
    if allowed:
        verify(graph, stage)
        return
    with pytest.raises(VerificationError, match="an op of stage 'fused' may not occur at stage 'primitive'"):
        verify(graph, stage)


def test_types_are_inferred_again() -> None:
    x = Value(Node(Input("x"), (), (TensorType(F32, (2,)),)))
    wrong = Node(Exp(), (x,), (TensorType(F32, (3,)),), "layers.1")
    graph = Graph("g", (x,), (), (), (("y", Value(wrong)),))
    with pytest.raises(VerificationError) as caught:
        verify(graph)
    expected = "graph g, node exp(input: f32[2]) at layers.1 (read by nothing): recorded as f32[3], inferred as f32[2]"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%1 = matmul(%x, %x) : f32[2, 3]", r"matmul: expected x\[\.\.\., m, k\]"),
        ("%1 = rms_norm(%x) {eps=0.1} : f32[2, 3]", "rms_norm does not take 1 operands"),
        ("%1 = rope(%x, %x, %x) {num_heads=0, head_dim=0, rotary_dim=2} : f32[2, 3]", "expected an even rotary_dim"),
        ("%1 = attention(%x, %x, %x, %x) {num_heads=2, num_kv_heads=0, head_dim=1, scale=1.0} : f32[2, 3]", "no sense"),
        ("%1, %2 = exp(%x) : f32[2, 3]; f32[2, 3]", r"recorded as f32\[2, 3\], f32\[2, 3\], inferred as f32\[2, 3\]"),
        ("%1 = transpose(%x) {axes=[0, 7]} : f32[2, 3]", "expected axes that permute rank 2"),
    ],
)
def test_texts_that_parse_and_are_wrong(line: str, message: str) -> None:
    graph = parse(f"graph g {{\n input %x: f32[2, 3]\n {line}\n return y=%1\n}}")
    with pytest.raises(VerificationError, match=message) as caught:
        verify(graph)
    assert "graph g, node " in str(caught.value)


def test_readers_are_named() -> None:
    text = "graph g {\n input %x: f32[2]\n %1 = exp(%x) : f32[3]\n %2 = neg(%1) : f32[3]\n return y=%2\n}"
    with pytest.raises(VerificationError, match=r"node exp\(input: f32\[2\]\) at no place \(read by neg\)"):
        verify(parse(text))


def test_leaves_are_declared_once() -> None:
    b = Builder("g")
    x, w = b.input("x", F32, (2,)), b.param("w", F32, (2,))
    graph = b.graph({"y": b.add(x, w)})
    with pytest.raises(VerificationError, match="it reads 'w', which the graph does not declare"):
        verify(replace(graph, params=()))
    with pytest.raises(VerificationError, match="input x is declared twice"):
        verify(replace(graph, inputs=(x, x)))
    other = Value(Node(Param("w"), (), (TensorType(F32, (3,)),)))
    with pytest.raises(VerificationError, match="parameter w is declared twice"):
        verify(replace(graph, params=(w, other)))
    with pytest.raises(VerificationError, match="it returns 'x', which it does not declare"):
        verify(Graph("g", (), (), (), (("y", x),)))


def test_a_result_that_a_node_does_not_have() -> None:
    b = Builder("g")
    x = b.input("x", F32, (2,))
    inner = b.exp(x)
    graph = Graph("g", (x,), (), (), (("y", Value(Node(Exp(), (Value(inner.node, 1),), inner.node.types))),))
    with pytest.raises(VerificationError, match=r"exp\(exp: \?\).*it reads result 1 of exp, which has fewer"):
        verify(graph)


def test_states_are_a_chain() -> None:
    b, key, value = stateful()
    first = appended(b, key, value)
    twice = appended(b, key, value)
    with pytest.raises(VerificationError, match=r"state 'key' is used again after kv_append\(.*\) has replaced it"):
        verify(b.graph({"a": b.exp(first[0])}, {"key": twice[0], "value": twice[1]}))
    with pytest.raises(VerificationError, match="state 'key' does not return its last version"):
        verify(b.graph({}, {"key": key, "value": first[1]}))
    with pytest.raises(VerificationError, match="state 'key' is used again"):
        verify(b.graph({"old": b.exp(key)}, {"key": first[0], "value": first[1]}))
    with pytest.raises(VerificationError, match="2 states have 1 next values"):
        graph = b.graph({}, {"key": first[0], "value": first[1]})
        verify(replace(graph, next_states=graph.next_states[:1]))


def test_the_builder_refuses_a_second_type() -> None:
    b = Builder("g")
    w = b.param("w", F32, (2,))
    assert b.param("w", F32, (2,)) == w
    with pytest.raises(LlmcError, match=r"param 'w' was declared as f32\[2\] and is now asked for as f32\[3\]"):
        b.param("w", F32, (3,))
    with pytest.raises(LlmcError, match=r"there is no op 'rms_nrom'; did you mean 'rms_norm'\?"):
        b.rms_nrom(w)
    assert isinstance(b.state(KEY).op, StateInput)
