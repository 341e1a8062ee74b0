"""What quantizing replaces, and that the result computes with codes: written once more in numpy."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmc.ir.cost import graph_cost
from llmc.ir.errors import LlmcError, ParseError
from llmc.ir.graph import Graph, Leaf
from llmc.ir.interpret import interpret
from llmc.ir.op import Array
from llmc.ir.ops.quantized import DequantizeWeight, QuantizeWeight
from llmc.ir.quant import FORMATS, INTEGER_FORMATS
from llmc.ir.text import parse
from llmc.ir.types import DType
from llmc.passes.base import PassContext
from llmc.passes.observe import NumericsCheck, Verifier, together
from llmc.passes.pipelines import COMMON, model_pipeline, read_pipeline, step_pipeline
from llmc.passes.quantize import INT8, KEPT, Quantize
from llmc.passes.trials import random_parameter
from tests.ir.example import silu
from tests.ir.quantized_examples import fake
from tests.passes.graphs import Model, counts, learned_model, rotary_model

LAYER = {"quantized_linear": 3, "quantized_gated_linear": 1}


def formats(graph: Graph) -> Counter[str]:
    """`op:format` of the nodes that read codes."""
    found = (f"{n.op.name}:{getattr(n.op, 'format', '')}" for n in graph.nodes if n.op.name.startswith("quantized_"))
    return Counter(found)


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_every_linear_of_a_layer(name: str) -> None:
    context, layers = PassContext(), 3
    model = rotary_model(layers=layers, width=8, rotary=8, weights=DType.BF16)
    step = step_pipeline(DType.F16, quant=Quantize(name)).run(model, context, together(Verifier(), NumericsCheck()))
    found = counts(step)
    assert {k: found[k] for k in ("linear", "gated_linear", "embedding")} == dict.fromkeys(
        ("linear", "gated_linear", "embedding"), 0
    )
    assert found["quantized_linear"] == 3 * layers + 1
    assert found["quantized_gated_linear"] == layers
    assert found["quantized_embedding"] == 1
    assert {k: context.counts[f"quantized-{k}"] for k in ("linear", "gated_linear", "embedding")} == {
        "linear": 3 * layers + 1,
        "gated_linear": layers,
        "embedding": 1,
    }
    packed = Counter(n.op.name for n in step.nodes if n in step.parameter_only)
    assert packed["quantize_weight"] == 4 * layers + 1, "the table and the head share their codes"
    assert parse(str(step)) == step


@pytest.mark.parametrize("name", FORMATS)
def test_every_linear_of_a_layer_with_activations_kept(name: str) -> None:
    """The same weights are quantized and read; the linears are linears."""
    context, layers, watch = PassContext(), 3, together(Verifier(), NumericsCheck())
    model = rotary_model(layers=layers, width=8, rotary=8, weights=DType.BF16)
    step = step_pipeline(DType.F16, quant=Quantize(name, activations=KEPT)).run(model, context, watch)
    found = counts(step)
    assert {k: v for k, v in found.items() if k.startswith("quantized")} == {"quantized_embedding": 1}
    assert found["linear"] == 3 * layers + 1
    assert found["gated_linear"] == layers
    for node in step.nodes:
        if node.op.name in ("linear", "gated_linear"):
            weight = node.inputs[1]
            assert weight.op.name == "dequantize_weight"
            assert [v.op for v in weight.node.inputs] == [QuantizeWeight(name)] * 2
            assert weight.node in step.parameter_only
    assert context.counts["quantized-linear"] == 3 * layers + 1
    packed = Counter(n.op.name for n in step.nodes if n in step.parameter_only)
    assert packed["quantize_weight"] == packed["dequantize_weight"] == 4 * layers + 1
    assert parse(str(step)) == step


def test_rows_are_gathered_before_a_quantized_head() -> None:
    step = step_pipeline(DType.F16, quant=Quantize("q4")).run(rotary_model())
    (gather,) = [n for n in step.nodes if n.op.name == "gather_rows"]
    assert gather.inputs[0].op.name == "quantized_linear"
    assert [n.op.name for n, _ in step.uses[gather.results[0]]] == ["rms_norm"]


def untied(model: Graph) -> Graph:
    """The model with a head of its own."""
    b = Model()
    weight = b.param("head.weight", model.params[0].type.dtype, (11, 16))
    graph = COMMON.run(model)

    def emit(node: Any, inputs: Any) -> Any:
        head = node.op.name == "linear" and node.inputs[1] == graph.leaf("embed.weight")
        return b.make(node.op, (inputs[0], weight) if head else inputs).results

    return replace(graph.map(emit), params=(*graph.params, weight))


ROTARY = {"quantized_linear:q4": 6, "quantized_gated_linear:q4": 2}


@pytest.mark.parametrize(
    ("options", "tied", "expected"),
    [
        ("format=q4", True, {**ROTARY, "quantized_linear:q4": 7, "quantized_embedding:q4": 1}),
        ("format=q4", False, {**ROTARY, "quantized_linear:q4": 7}),
        ("format=q4,lm_head=q8", True, {**ROTARY, "quantized_linear:q8": 1, "quantized_embedding:q8": 1}),
        ("format=q4,lm_head=q8,embedding=q8", True, {**ROTARY, "quantized_linear:q8": 1, "quantized_embedding:q8": 1}),
        ("format=q4,lm_head=none", True, ROTARY),
        ("format=q4,lm_head=none,embedding=none", True, ROTARY),
        ("format=none,lm_head=q4", True, {"quantized_linear:q4": 1, "quantized_embedding:q4": 1}),
        ("format=none,lm_head=q4", False, {"quantized_linear:q4": 1}),
        ("format=q4,lm_head=q8,embedding=q4", False, {**ROTARY, "quantized_linear:q8": 1, "quantized_embedding:q4": 1}),
        ("format=none,embedding=q8", False, {"quantized_embedding:q8": 1}),
        ("format=q8,embedding=none", False, {"quantized_linear:q8": 7, "quantized_gated_linear:q8": 2}),
        ("format=none", True, {}),
    ],
)
def test_parts(options: str, tied: bool, expected: dict[str, int]) -> None:
    graph = COMMON.run(rotary_model()) if tied else untied(rotary_model())
    assert formats(read_pipeline(f"quantize{{{options}}}").run(graph, observer=Verifier())) == expected


@pytest.mark.parametrize(
    "options", ["lm_head=q8,embedding=q4", "embedding=none", "embedding=q8", "lm_head=none,embedding=q4"]
)
def test_head_and_table_that_disagree(options: str) -> None:
    graph = COMMON.run(rotary_model())
    with pytest.raises(LlmcError, match=r"one tensor; give both the same format"):
        read_pipeline(f"quantize{{format=q4,{options}}}").run(graph)


def test_positions_are_no_tokens() -> None:
    after = model_pipeline(Quantize("q4", embedding="q8")).run(learned_model())
    (places,) = (n for n in after.nodes if n.op.name == "embedding")
    assert places.loc == "places"


def test_mistakes() -> None:
    with pytest.raises(ParseError, match=r"'quantize': format: there is no weight format 'q44'; did you mean 'q4'"):
        read_pipeline("quantize{format=q44}")
    with pytest.raises(ParseError, match=r"lm_head: there is no weight format 'non'; did you mean 'none'"):
        read_pipeline("quantize{format=q4,lm_head=non}")
    with pytest.raises(ParseError, match="the pass 'quantize' needs the option 'format'"):
        read_pipeline("quantize")
    with pytest.raises(ParseError, match="'quantize': activations are int8 or kept, given 'f16'"):
        read_pipeline("quantize{format=q4,activations=f16}")
    with pytest.raises(
        ParseError, match=r"format: there is no weight format 'q5'; known: fp8, none, q4, q4g128, q4g64"
    ):
        read_pipeline("quantize{format=q5,activations=kept}")
    for text in ("quantize{format=q4,lm_head=q8}", "quantize{format=fp8,lm_head=q4g64,activations=kept}"):
        assert str(read_pipeline(text)) == text


@pytest.mark.parametrize("part", ["format", "lm_head", "embedding"])
@pytest.mark.parametrize("name", ["q8g128", "q4g64", "q4g128", "fp8"])
def test_formats_that_integers_do_not_go_with(part: str, name: str) -> None:
    """No op that multiplies integers is made with them, and no other in their place."""
    with pytest.raises(
        LlmcError,
        match=f"^{part}: {name} is for GPU targets only, where activations keep their dtype; a CPU target takes none,"
        " q8, q4$",
    ):
        Quantize(**{"format": "q4", part: name})
    assert getattr(Quantize(**{"format": "q4", "activations": KEPT, part: name}), part) == name


def test_a_budget_bisects() -> None:
    graph = COMMON.run(rotary_model())
    done = [sum(formats(Quantize("q4").run(graph, PassContext(limit))).values()) for limit in range(12)]
    assert done == [*range(11), 10]


def test_a_weight_that_is_computed_from_inputs_is_kept() -> None:
    b = Model()
    x = b.input("x", DType.F32, (4, 4))
    graph = b.graph({"logits": b.linear(x, b.exp(x))})
    assert Quantize("q4").run(graph, PassContext()) == graph


def rms(x: Array, weight: Array) -> Array:
    result: Array = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-5) * weight
    return result


def block() -> Graph:
    """An embedding, a gated block with a residual and a tied head."""
    b = Model(DType.BF16)
    table = b.param("embed.weight", DType.BF16, (11, 40))
    x = b.embedding(b.token_ids, table, dtype=DType.F32)
    y = b.rms_norm(x, b.param("norm", DType.F32, (40,)), eps=1e-5)
    y = b.gated_linear(
        y,
        b.concat(b.param("gate", DType.BF16, (24, 40)), b.param("up", DType.BF16, (24, 40)), axis=0),
        activation="silu",
    )
    x = b.linear(
        y, b.param("down", DType.BF16, (40, 24)), b.param("bias", DType.F32, (40,)), x, bias=True, residual=True
    )
    return b.graph({"logits": b.linear(x, table)})


IDS = np.array([3, 0, 10, 3, 7])
INPUTS = {"token_ids": IDS, "positions": np.arange(5)}


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_what_is_computed(name: str) -> None:
    """Of activations and weights as their codes say."""
    graph = block()
    arrays = {
        v.op.label: random_parameter(v).astype(v.type.dtype.numpy) for v in graph.params if isinstance(v.op, Leaf)
    }
    after = Quantize(name).run(graph, PassContext())
    got = interpret(after, INPUTS, arrays).outputs["logits"]

    def read(label: str) -> Array:
        weight = arrays[label].astype(np.float64)
        codes, scales = FORMATS[name].quantize(weight)
        zero = {"q8": 128.0, "q4": 8.0}[name]
        return ((codes - zero) * np.repeat(scales.astype(np.float64), 32, 1))[:, : weight.shape[1]]

    hidden = read("embed.weight")[IDS]
    inner = fake(rms(hidden, arrays["norm"].astype(np.float64)))
    inner = silu(inner @ read("gate").T) * (inner @ read("up").T)
    hidden = hidden + fake(inner) @ read("down").T + arrays["bias"]
    np.testing.assert_allclose(got, fake(hidden) @ read("embed.weight").T, rtol=1e-9, atol=1e-12)
    plain = interpret(graph, INPUTS, arrays).outputs["logits"]
    assert np.abs(got - plain).max() < {"q8": 0.03, "q4": 0.3}[name] * np.abs(plain).max()
    assert np.abs(got - plain).max() > 0


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_computed_with_activations_kept(name: str) -> None:
    """Exactly what the unquantized graph computes of the weights that the codes say."""
    graph, quant = block(), FORMATS[name]
    arrays = {v.op.label: random_parameter(v) for v in graph.params if isinstance(v.op, Leaf)}
    said = {
        label: quant.dequantize(*quant.quantize(array), array.shape[1]) if array.ndim == 2 else array
        for label, array in arrays.items()
    }
    after = Quantize(name, activations=KEPT).run(graph, PassContext())
    assert not {"linear", "gated_linear"} - counts(after).keys()
    got = interpret(after, INPUTS, arrays).outputs["logits"]
    np.testing.assert_array_equal(got, interpret(graph, INPUTS, said).outputs["logits"])
    plain = interpret(graph, INPUTS, arrays).outputs["logits"]
    bound = {"q8": 0.03, "q4": 0.3, "fp8": 0.15}[name[:3] if name == "fp8" else name[:2]]
    assert 0 < np.abs(got - plain).max() < bound * np.abs(plain).max()


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_what_a_step_moves_is_counted_in_true_bits_either_way(name: str) -> None:
    """A product over codes, or over what they are dequantized to: its weight is read once, as it is stored."""
    sizes = {"tokens": 5}
    both = [Quantize(name, activations=a).run(COMMON.run(rotary_model()), PassContext()) for a in (INT8, KEPT)]
    codes, kept = (graph_cost(graph, sizes) for graph in both)
    assert kept.bytes == codes.bytes
    assert kept.flops == codes.flops
    assert kept.bytes < graph_cost(COMMON.run(rotary_model()), sizes).bytes


def test_parts_with_activations_kept() -> None:
    """Formats of their own for the head and what is not a linear; what is not asked for stays as it is."""
    graph = untied(rotary_model())
    options = "format=none,lm_head=q4g128,embedding=fp8,activations=kept"
    after = read_pipeline(f"quantize{{{options}}}").run(graph, observer=Verifier())
    assert formats(after) == {"quantized_embedding:fp8": 1}
    read = {n.inputs[1].op for n in after.nodes if n.op.name in ("linear", "gated_linear")}
    assert [op for op in read if op.name == "dequantize_weight"] == [DequantizeWeight("q4g128", 16)]
