"""The text form: it round-trips, folds repeated layers, and says what it cannot read."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.ir.builder import Builder
from llmc.ir.errors import LlmcError, ParseError
from llmc.ir.graph import Graph, State
from llmc.ir.op import Value
from llmc.ir.printer import INLINE, layer_index, layer_template, print_graph
from llmc.ir.text import parse, parse_attribute
from llmc.ir.types import DType, symbol
from llmc.ir.verify import verify
from llmc.passes.pipelines import entry_pipeline, step_pipeline
from tests.passes.graphs import learned_model, rotary_model

F32 = DType.F32
STEP = step_pipeline(DType.F16).run(rotary_model(layers=4))
GRAPHS = {
    "rotary": rotary_model(layers=4),
    "learned": learned_model(layers=3),
    "one layer": rotary_model(layers=1),
    "no layer": rotary_model(layers=0),
    "step": STEP,
    "decode": entry_pipeline("decode").run(STEP),
    "learned step": step_pipeline(DType.F32).run(learned_model(layers=2)),
}


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", GRAPHS)
def test_round_trip(name: str, fold: bool) -> None:
    graph = GRAPHS[name]
    text = print_graph(graph, fold)
    again = parse(text, graph.constants)
    assert again == graph
    assert print_graph(again, fold) == text
    verify(again)


def test_repeated_layers_are_written_once() -> None:
    short, long = (str(step_pipeline(DType.F16).run(rotary_model(layers=n))) for n in (3, 30))
    assert len(short.splitlines()) == len(long.splitlines())
    assert "repeat layer = 0..29 carry (" in long
    assert "repeat layer = 0..29 {" in long
    assert parse(long) == step_pipeline(DType.F16).run(rotary_model(layers=30))


LAYERS = st.lists(
    st.tuples(st.sampled_from([0, 0, 0, 1]), st.booleans(), st.booleans(), st.sampled_from(["l", "m"])), max_size=7
)


@settings(max_examples=150)
@given(LAYERS, st.integers(0, 3), st.integers(-1, 7))
def test_layers_of_any_kind_round_trip(layers: list[tuple[int, bool, bool, str]], start: int, tap: int) -> None:
    """Layers that differ, skip numbers, read each other's values or only the first, with states of their own; the
    value of any layer may be a result."""
    b = Builder("g")
    tokens = symbol("t", 1, 9)
    first = x = b.exp(b.input("x", F32, (tokens, 4)))
    previous = x
    made_by = [x]
    following: dict[str, Value] = {}
    number = start
    for skip, with_state, far, name in layers:
        number += 1 + skip
        with b.at(f"{name}.{number}"):
            y = b.add(x, previous if far else first)
            previous = x
            y = b.mul(y, b.param(f"{name}.{number}.w", F32, (4,)))
            if with_state:
                shape = (symbol("blocks"), 1, 4, 2)
                key = b.state(State(f"{name}.{number}.key", "paged_kv", F32, shape))
                value = b.state(State(f"{name}.{number}.value", "paged_kv", F32, (shape[0], 1, 2, 4)))
                slots = b.input("slots", DType.I32, (tokens,))
                made = b.kv_append(y, x, slots, key, value, num_kv_heads=1, head_dim=4)
                following |= {f"{name}.{number}.key": made[0], f"{name}.{number}.value": made[1]}
            x = b.exp(y)
            made_by += [x]
    outputs = {"x": x, **({"tap": made_by[min(tap, len(layers))], "previous": previous} if tap >= 0 else {})}
    graph = b.graph(outputs, following)
    verify(graph)
    text = str(graph)
    assert parse(text) == graph
    assert str(parse(text)) == text
    assert parse(print_graph(graph, fold=False)) == graph


def test_two_carried_values_that_start_as_one() -> None:
    b = Builder("g")
    x = y = b.exp(b.input("x", F32, (4,)))
    for layer in range(4):
        with b.at(f"layers.{layer}"):
            total = b.add(x, y)
            x, y = b.neg(total), b.sin(total)
    graph = b.graph({"x": x, "y": y})
    assert parse(str(graph)) == graph


@pytest.mark.parametrize("tap", range(5))
def test_a_result_from_among_the_layers(tap: int) -> None:
    b = Builder("g")
    values = [b.exp(b.input("x", F32, (4,)))]
    for layer in range(4):
        with b.at(f"layers.{layer}"):
            values.append(b.neg(values[-1]))
    graph = b.graph({"out": values[-1], "tap": values[tap]})
    assert parse(str(graph)) == graph


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2), (1, 4, 4), (17,), (0,), (0, 3)])
def test_constants(dtype: DType, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    array = (
        rng.standard_normal(shape) * rng.choice([1e-30, 1e-6, 1, 1e4]) if dtype.is_float else rng.integers(0, 2, shape)
    )
    b = Builder("g")
    graph = b.graph({"c": b.constant(array, dtype)})
    small = 0 < array.size <= INLINE
    assert ("sha256" in str(graph)) is not small
    assert parse(str(graph), {} if small else graph.constants) == graph


@given(st.lists(st.floats(width=32) | st.just(-0.0), min_size=1, max_size=8), st.sampled_from(["f64", "f32"]))
def test_inline_constants_are_exact(numbers: list[float], dtype: str) -> None:
    b = Builder("g")
    graph = b.graph({"c": b.constant(numbers, DType(dtype))})
    finite = np.isfinite(np.array(numbers)).all()
    assert parse(str(graph), {} if finite else graph.constants) == graph


def small(line: str = "", head: str = "", returned: str = "out=%x") -> str:
    """A small graph's text, with one more line."""
    return f"graph g {{\n  symbol t = 1..9\n  input %x: f32[t, 4]\n{head}  {line}\n  return {returned}\n}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty text is no graph"),
        ("// nothing\n", "an empty text is no graph"),
        ("graph {\n}", r"line 1: expected 'graph NAME \{'; given: graph \{"),
        ("graph g {\n", "the text ends before the closing"),
        ("graph g {\n}", "line 2: expected a 'return' line before the end"),
        (small("%1 = exq(%x) : f32[t, 4]"), r"line 4: there is no op 'exq'; did you mean 'exp'\?"),
        (small("%1 = param() {label='w'} : f32[4]"), "there is no op 'param'"),
        (small("%1 = hole() {index=0} : f32[4]"), "there is no op 'hole'"),
        (small("%1 = exp(%y) : f32[t, 4]"), r"line 4: %y is not defined above; known: %x"),
        (small("%1 = exp(%x) : f33[t, 4]"), r"line 4: expected a type dtype\[shape\], not 'f33\[t, 4\]'"),
        (small("%1 = exp(%x) : f32[u, 4]"), "u is neither a symbol nor a dtype; did you mean"),
        (small("%1 = exp(%x) : f32[t, -4]"), "dimensions that are sizes or symbols"),
        (small("%1 = exp(%x) : f32[t, 1.5]"), "dimensions that are sizes or symbols"),
        (small("%1 = exp(%x) : f32[t * t]"), "dimensions are linear"),
        (small("%1 = exp(%x) : f32[t // 0]"), "are added, subtracted, multiplied by and divided"),
        (small("%1 = exp(%x) : f32[2 ** 9]"), "are added, subtracted, multiplied by and divided"),
        (small("%1, %2 = exp(%x) : f32[t, 4]"), r"as many types as results \(2\)"),
        (
            small("%1 = mul_scalar(%x) : f32[t, 4]"),
            "line 4: mul_scalar: .*missing 1 required positional argument: 'value'",
        ),
        (small("%1 = mul_scalar(%x) {factor=2.0} : f32[t, 4]"), "unexpected keyword argument 'factor'"),
        (small("%1 = mul_scalar(%x) {value='2'} : f32[t, 4]"), "value must be of kind float, given '2'"),
        (small("%1 = transpose(%x) {axes=[0, t]} : f32[t, 4]"), r"axes must be of kind tuple\[int, \.\.\.\]"),
        (small("%1 = reshape(%x) {shape=4} : f32[4]"), "shape must be of kind Shape, given 4"),
        (small("%1 = cast(%x) {dtype=4} : f32[4]"), "dtype must be of kind DType, given 4"),
        (small("%1 = mul_scalar(%x) {2.0} : f32[t, 4]"), "expected attribute=value, not '2.0'"),
        (
            small("%1 = mul_scalar(%x) {value=open('x')} : f32[t, 4]"),
            r"cannot read the value .*: open\('x'\) is no value",
        ),
        (small("%1 = mul_scalar(%x) {value=1 +} : f32[t, 4]"), r"cannot read the value '1 \+'"),
        (small("%1 = constant() {dtype=f32, value=[[1], [2, 3]]} : f32[2]"), "line 4: constant: "),
        (small("%1 = constant() {dtype=f32, value='a'} : f32[2]"), "line 4: constant: "),
        (
            small('%1 = constant() {dtype=f32, value=sha256("00")} : f32[2]'),
            "the constant 00… was not given beside the text",
        ),
        (small("exp %x"), r"line 4: expected '%a = op\(%b\)"),
        (small("input %x: f32[4]"), "each input once; 'x' is declared twice"),
        (small("state &s: f32[4]"), r"'state &name: kind dtype\[shape\] group'"),
        (small("next &s = %x"), "a state; there is none"),
        (small(returned="%x"), "'return name=%value'"),
        (small(returned="out=%y"), "%y is not defined above"),
        (small("symbol u = 5..2"), "bounds 5..2, multiple of 1 are empty"),
        (small("symbol t = 1..3"), "each symbol once; 't' is declared twice"),
        ("graph g {\nrepeat layer = 0..1 {\n", "line 2: the 'repeat' that begins here has no closing"),
        (small("repeat layer = 0..99999 {\n  }"), "1 to 4096 repeats"),
        (small("repeat layer = 3..1 {\n  }"), "1 to 4096 repeats"),
        (small("repeat layer = 0..1 {\nrepeat layer = 0..1 {\n}\n}"), "no 'repeat' inside another"),
        (small("repeat layer = 0..1 carry (%1 = %x) {\n  }"), "carries of the form '%name = %initial <- %following'"),
        (small("%1 = repeat layer = 0..1 {\n  }"), "1 names are bound to 0 results"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ParseError, match=message):
        parse(text)


TEXTS = [str(g) for g in (STEP, learned_model(layers=1))]


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_damaged_texts_are_refused_in_words(seed: int, damages: int) -> None:
    """A text with pieces removed, doubled or exchanged is read, or refused with one of our errors."""
    rng = random.Random(seed)
    text = rng.choice(TEXTS)
    for _ in range(damages):
        pieces = re.split(r"(\W)", text)
        at, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        match rng.randrange(4):
            case 0:
                del pieces[at]
            case 1:
                pieces.insert(at, pieces[other])
            case 2:
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case _:
                pieces[at] = rng.choice(
                    ["", "-1", "0", "9" * 30, "'", "[", "}", "t", "f16", "\x00", "é", "None", "inf"]
                )
        text = "".join(pieces)
    try:
        graph = parse(text)
        verify(graph)
    except LlmcError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-1.5", -1.5),
        ("-inf", float("-inf")),
        ("'a, b'", "a, b"),
        ("[1, [2, 3], []]", (1, (2, 3), ())),
        ("None", None),
        ("True", True),
        ("bf16", DType.BF16),
        ("1e-05", 1e-5),
    ],
)
def test_attributes(text: str, value: object) -> None:
    assert parse_attribute(text) == value


def test_layers_by_name() -> None:
    assert layer_index("model.layers.12.mlp.0") == 12
    assert layer_index("model.norm") is None
    assert layer_index("h2.w") is None
    assert layer_template("model.layers.12.experts.12", 12) == "model.layers.{layer}.experts.12"
    assert layer_template("model.layers.12", 11) == "model.layers.12"


def test_graphs_of_another_shape_differ() -> None:
    assert rotary_model(layers=2) != rotary_model(layers=3)
    assert rotary_model() == rotary_model()
    assert rotary_model() != "a text"
    assert isinstance(rotary_model(), Graph)
