"""Whole pipelines on models: each fusion fires once per layer, nothing is left over, and nothing changes in float64."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.importers.hf import import_model
from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph
from llmc.ir.printer import layer_index
from llmc.ir.text import parse
from llmc.ir.types import DType
from llmc.passes.base import PassContext, Pipeline
from llmc.passes.observe import NumericsCheck, Verifier, together
from llmc.passes.pipelines import COMMON, entry_pipeline, read_pipeline, step_pipeline
from tests.fixtures import fixture_path
from tests.passes.graphs import counts, learned_model, rotary_model

ROTARY_LAYER = Counter(
    {"rms_norm": 2, "linear": 3, "rope_append": 1, "paged_attention": 1, "gated_linear": 1},
)
LEARNED_LAYER = Counter({"layer_norm": 2, "linear": 4, "qkv_append": 1, "paged_attention": 1})
ROTARY_REST = Counter(
    {"embedding": 1, "rotary_table": 1, "rms_norm": 1, "gather_rows": 1, "linear": 1, "argmax": 1},
)
LEARNED_REST = Counter({"embedding": 2, "add_layer_norm": 1, "gather_rows": 1, "linear": 1, "argmax": 1})

ROTARY_FIRINGS = {"rope-append": 1, "attention": 1, "gated-linear": 1, "silu": 1, "pack-linears": 1, "rope": 2}
ROTARY_FIRINGS |= {"linear-residual": 2}
LEARNED_FIRINGS = {"qkv-append": 1, "attention": 1, "gelu-tanh": 1, "linear-activation": 1, "linear-bias": 4}
LEARNED_FIRINGS |= {"linear-residual": 2}


def scaled(per_layer: Counter[str], layers: int, rest: Counter[str]) -> Counter[str]:
    return Counter({k: n * layers for k, n in per_layer.items()}) + rest


def check_counts(step: Graph, context: PassContext, layers: int, more: Counter[str] | None = None) -> None:
    """The final ops of a step (and `more`), and the firings that made them."""
    if context.counts["rotary-table"]:
        # Every sum is made by the linear before it.
        assert counts(step) == scaled(ROTARY_LAYER, layers, ROTARY_REST + (more or Counter()))
        expected = {**{k: n * layers for k, n in ROTARY_FIRINGS.items()}, "rotary-table": 1, "rms-norm": 2 * layers + 1}
    else:
        # But for the first, of two embeddings, which its norm makes.
        assert counts(step) == scaled(LEARNED_LAYER, layers, LEARNED_REST)
        expected = {**{k: n * layers for k, n in LEARNED_FIRINGS.items()}, "layer-norm": 2 * layers + 1}
    fired = Counter(context.counts)
    fired["rope"] += sum(fired[k] for k in ("rope-part", "rope-interleaved", "rope-interleaved-part"))
    assert {k: fired[k] for k in expected} == expected


@pytest.mark.parametrize(
    ("graph", "layers"),
    [
        (rotary_model(layers=3), 3),
        (rotary_model(kv_heads=4), 2),
        (rotary_model(kv_heads=1, width=6, rotary=6), 2),
        (rotary_model(heads=1, kv_heads=1), 2),
        (rotary_model(layers=1, weights=DType.BF16), 1),
        (rotary_model(qkv_bias=True, weights=DType.F16), 2),
        (learned_model(layers=3), 3),
        (learned_model(layers=1, heads=1, weights=DType.BF16), 1),
    ],
    ids=["grouped", "ungrouped", "one-kv-head", "one-head", "bf16", "bias", "learned", "learned-bf16"],
)
def test_each_fusion_fires_once_per_layer(graph: Graph, layers: int) -> None:
    context = PassContext()
    numerics = NumericsCheck()
    step = step_pipeline(DType.F16).run(graph, context, together(Verifier(), numerics))
    check_counts(step, context, layers)
    assert parse(str(step)) == step
    for entry in ("decode", "prefill", "verify"):
        entry_pipeline(entry).run(step, observer=together(Verifier(), NumericsCheck()))


@pytest.mark.parametrize("rotary", [2, 4])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_every_rotation_is_recognised(rotary: int, layout: str) -> None:
    context = PassContext()
    step = step_pipeline(DType.F32).run(
        rotary_model(rotary=rotary, layout=layout), context, together(Verifier(), NumericsCheck())
    )
    assert counts(step) == scaled(ROTARY_LAYER, 2, ROTARY_REST)
    (append,) = {n.op for n in step.nodes if n.op.name == "rope_append"}
    assert getattr(append, "rotary_dim", None) == rotary
    assert getattr(append, "layout", None) == layout


def test_frequencies_that_depend_on_positions() -> None:
    step = step_pipeline(DType.F32).run(rotary_model(dynamic=True), observer=together(Verifier(), NumericsCheck()))
    assert counts(step) == scaled(ROTARY_LAYER, 2, ROTARY_REST + Counter({"cast": 1, "dynamic_frequencies": 1}))


@settings(max_examples=20)
@given(
    layers=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2), (6, 2), (7, 1)]),
    width=st.sampled_from([(2, 2), (4, 2), (6, 6), (10, 4)]),
    layout=st.sampled_from(["half", "interleaved"]),
    weights=st.sampled_from([DType.F32, DType.BF16]),
    bias=st.booleans(),
    dynamic=st.booleans(),
)
def test_models_of_any_size(
    layers: int,
    heads: tuple[int, int],
    width: tuple[int, int],
    layout: str,
    weights: DType,
    bias: bool,
    dynamic: bool,
) -> None:
    dynamic = dynamic and width[1] > 2  # its exponent is d / (d - 2)
    model = rotary_model(layers, *heads, *width, layout, weights, bias, dynamic)
    context = PassContext()
    step = step_pipeline(DType.F16).run(model, context, together(Verifier(), NumericsCheck()))
    check_counts(step, context, layers, Counter({"cast": 1, "dynamic_frequencies": 1}) if dynamic else Counter())
    entry_pipeline("decode", sequences=5).run(step, observer=together(Verifier(), NumericsCheck()))


def test_nothing_else_is_in_a_layer() -> None:
    step = step_pipeline(DType.F32).run(rotary_model(layers=3))
    layer = [n.op.name for n in step.nodes if n not in step.parameter_only and layer_index(n.loc) == 1]
    assert layer == [
        "rms_norm",
        "linear",
        "rope_append",
        "paged_attention",
        "linear",
        "rms_norm",
        "gated_linear",
        "linear",
    ]


@pytest.mark.parametrize(
    "order",
    [
        "raise-linear,pack-linears,fuse-mlp,fuse-norm,fuse-residual,fuse-rope,fuse-attention,canonicalize",
        "fuse-rope,fuse-norm,raise-linear,fuse-residual,fuse-attention,fuse-mlp,pack-linears,canonicalize",
        "canonicalize,constant-fold,raise-linear,fuse-rope,canonicalize,fuse-attention,fuse-residual,pack-linears,fuse-mlp,fuse-norm,canonicalize",
    ],
)
@pytest.mark.parametrize("model", [rotary_model, learned_model])
def test_the_order_is_not_what_makes_fusions_fire(order: str, model: type) -> None:
    usual = counts(COMMON.run(model(layers=2)))
    other = read_pipeline(order).run(model(layers=2), observer=together(Verifier(), NumericsCheck()))
    assert counts(other) == usual


def test_a_second_run_changes_nothing() -> None:
    once = COMMON.run(rotary_model())
    context = PassContext()
    assert COMMON.run(once, context) == once
    assert not {k: n for k, n in context.counts.items() if n}


@pytest.mark.parametrize(
    ("name", "layers"), [("picocode", 6), ("stories260K/hf", 5), ("gpt-nano-sort/hf", 3), ("babyllama-tok105/hf", None)]
)
def test_imported_models(name: str, layers: int | None) -> None:
    imported = import_model(fixture_path(f"models/{name}"))
    context = PassContext()
    step = step_pipeline(DType.F32).run(imported.graph, context, Verifier())
    check_counts(step, context, layers if layers is not None else imported.info.num_layers)
    assert parse(str(step), step.constants) == step


def test_an_imported_model_is_unchanged_in_float64() -> None:
    imported = import_model(fixture_path("models/stories260K/hf"))
    numerics = NumericsCheck(imported.weights.load)
    pipeline = step_pipeline(DType.F16) + entry_pipeline("prefill")
    pipeline.run(imported.graph, observer=numerics)
    assert len(numerics.errors) == len(pipeline.passes)


def test_a_failing_pass_is_named() -> None:
    with pytest.raises(LlmcError, match=r"pass specialize\{entry=decode\}: no step over a batch.*run paged-kv first"):
        read_pipeline("canonicalize,specialize{entry=decode}").run(rotary_model())
    assert str(Pipeline(())) == ""
