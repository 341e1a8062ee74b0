"""The interpreter as a whole: what it asks for, what it refuses, what it keeps."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest

from llmc.ir.builder import Builder
from llmc.ir.errors import LlmcError
from llmc.ir.graph import State
from llmc.ir.interpret import bind_symbols, evaluate_parameters, interpret
from llmc.ir.op import Array
from llmc.ir.types import DType, symbol
from tests.passes.graphs import learned_model, rotary_model

F32 = DType.F32


def test_a_prefix_does_not_depend_on_what_follows() -> None:
    """Causality, of whole models in primitive ops."""
    rng = np.random.default_rng(0)
    for model in (rotary_model(), learned_model()):
        weights = {getattr(p.op, "label", ""): rng.standard_normal(p.type.concrete({})) for p in model.params}
        ids = rng.integers(0, 11, 6)
        whole = interpret(model, {"token_ids": ids, "positions": np.arange(6)}, weights).outputs["logits"]
        part = interpret(model, {"token_ids": ids[:4], "positions": np.arange(4)}, weights).outputs["logits"]
        np.testing.assert_allclose(whole[:4], part, rtol=1e-10, atol=1e-12)


def test_floats_are_float64_whatever_was_given() -> None:
    b = Builder("g")
    x = b.input("x", DType.F16, (2,))
    graph = b.graph({"third": b.mul_scalar(x, value=1 / 3), "cast": b.cast(x, dtype=DType.BF16)})
    given = np.array([1.0, 1.003], np.float64)
    outputs = interpret(graph, {"x": given}, {}).outputs
    assert outputs["third"].dtype == np.float64
    np.testing.assert_array_equal(outputs["third"], given * (1 / 3))
    np.testing.assert_array_equal(outputs["cast"], given.astype(ml_dtypes.bfloat16).astype(np.float64))


def test_mistakes() -> None:
    b = Builder("g")
    t = symbol("t")
    x, y = b.input("x", F32, (t, 2)), b.input("y", F32, (t + 1,))
    w = b.param("w", F32, (2,))
    graph = b.graph({"out": b.add(b.mul(x, w), b.mean(y))})
    good = {"x": np.ones((3, 2)), "y": np.ones(4)}
    weights = {"w": np.ones(2)}
    assert interpret(graph, good, weights).outputs["out"].shape == (3, 2)
    for inputs, params, message in (
        ({"x": good["x"]}, weights, r"no array was given for 'y': f32\[t \+ 1\]"),
        (good, {}, r"no array was given for 'w': f32\[2\]"),
        ({**good, "y": np.ones(3)}, weights, r"'y' is f32\[t \+ 1\], given an array of shape \[3\]"),
        ({**good, "x": np.ones((3, 3))}, weights, r"'x' is f32\[t, 2\], given an array of shape \[3, 3\]"),
        ({**good, "x": np.ones(3)}, weights, r"'x' is f32\[t, 2\], given an array of shape \[3\]"),
        (good, {"w": np.ones(3)}, r"'w' is f32\[2\], given an array of shape \[3\]"),
    ):
        with pytest.raises(LlmcError, match=message):
            interpret(graph, inputs, params)


def test_inputs_that_nothing_reads_are_not_asked_for() -> None:
    b = Builder("g")
    b.input("unused", F32, (2,))
    assert interpret(b.graph({"c": b.constant([1.0], F32)}), {}, {}).outputs["c"].tolist() == [1.0]


def test_states_come_and_go() -> None:
    b = Builder("g")
    key = b.state(State("key", "paged_kv", F32, (symbol("blocks"), 1, 2, 4)))
    value = b.state(State("value", "paged_kv", F32, (symbol("blocks"), 1, 4, 2)))
    k, slots = b.input("k", F32, (1, 2)), b.input("slots", DType.I32, (1,))
    made = b.kv_append(k, k, slots, key, value, num_kv_heads=1, head_dim=2)
    graph = b.graph({"k": k}, {"key": made[0], "value": made[1]})
    states = {"key": np.zeros((3, 1, 2, 4)), "value": np.zeros((3, 1, 4, 2))}
    result = interpret(graph, {"k": np.array([[1.0, 2.0]]), "slots": np.array([6])}, {}, states)
    assert result.states["key"][1, 0, :, 2].tolist() == [1.0, 2.0]
    assert result.states["value"][1, 0, 2].tolist() == [1.0, 2.0]
    assert not states["key"].any()


def test_symbols_are_read_off_shapes() -> None:
    b = Builder("g")
    t = symbol("t")
    x = b.input("x", F32, (t * 2 + 1,))
    graph = b.graph({"x": b.exp(x)})
    assert bind_symbols(graph, {x: (7,)}) == {"t": 3}
    with pytest.raises(LlmcError, match="given an array of shape"):
        bind_symbols(graph, {x: (8,)})


def test_weights_stream_through() -> None:
    """Parameters are loaded when a node needs them, and let go."""
    b = Builder("g")
    x = b.input("x", F32, (1000,))
    for i in range(20):
        x = b.add(x, b.param(f"w{i}", F32, (1000,)))
    graph = b.graph({"out": x})
    alive: list[weakref.ref[Array]] = []
    most = 0

    class Tracked(np.ndarray):
        pass

    def load(label: str) -> Array:
        nonlocal most
        array = np.full(1000, 0.5).view(Tracked)
        alive.append(weakref.ref(array))
        most = max(most, sum(r() is not None for r in alive))
        return array

    gc.disable()
    try:
        result = interpret(graph, {"x": np.zeros(1000)}, load)
    finally:
        gc.enable()
    assert result.outputs["out"][0] == 10.0
    assert len(alive) == 20
    assert most <= 3


def test_values_are_dropped_when_nothing_needs_them() -> None:
    b = Builder("g")
    x = first = b.input("x", F32, (100_000,))
    for _ in range(30):
        x = b.neg(x)
    tracemalloc.start()
    try:
        interpret(b.graph({"out": b.add(x, first)}), {"x": np.ones(100_000)}, {})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * 800_000


def test_the_pack_program_moves_storage_and_computes_in_float64() -> None:
    b = Builder("g")
    w = b.param("w", DType.BF16, (2, 3))
    v = b.param("v", DType.BF16, (1, 3))
    stored = {
        "w": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "v": np.full((1, 3), 7).astype(ml_dtypes.bfloat16),
    }
    asked: list[str] = []

    def load(label: str) -> Array:
        asked.append(label)
        return stored[label]

    joined = b.concat(b.slice(w, axis=0, start=1, stop=2), v, axis=0)
    moved = evaluate_parameters(joined, load)
    assert moved.dtype == ml_dtypes.bfloat16
    assert moved.astype(float).tolist() == [[3, 4, 5], [7, 7, 7]]
    scaled = evaluate_parameters(b.mul_scalar(b.cast(w, dtype=F32), value=1 / 3), load)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, (np.arange(6).reshape(2, 3) / 3).astype(np.float32))
    assert asked == ["w", "v", "w"]
    constant = b.constant([[1.0, 2.0]], DType.F16)
    flipped = evaluate_parameters(b.transpose(constant, axes=(1, 0)), load)
    assert flipped.dtype == np.float16
    assert flipped.tolist() == [[1.0], [2.0]]
