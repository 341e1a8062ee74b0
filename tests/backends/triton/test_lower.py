"""Step graphs in ops that have Triton kernels: the same function, in few launches, weights in the format asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from llmc.backends.buffers import is_view
from llmc.backends.triton.lower import entry_graph, lower
from llmc.backends.triton.ops import BlockLinear
from llmc.backends.triton.select import has_kernel
from llmc.entries import specialised
from llmc.ir.errors import NoKernel
from llmc.ir.graph import Graph, Leaf, Param
from llmc.ir.interpret import interpret
from llmc.ir.op import Array, Emitter, Node, Value
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.ops.elementwise import Erf
from llmc.ir.ops.experts import Experts
from llmc.ir.ops.linear import GatedLinear
from llmc.ir.text import parse
from llmc.ir.types import DType, TensorType, symbol
from llmc.ir.verify import verify
from llmc.options import Limits
from llmc.passes.pipelines import COMMON, step_pipeline
from llmc.passes.quantize import KEPT, Quantize
from llmc.passes.trials import random_parameter, random_trial
from tests.backends.triton.nodes import leaf
from tests.passes.experts import mixture_graph
from tests.passes.graphs import learned_model, rotary_model

MODELS: dict[str, Callable[..., Graph]] = {
    "rotary": rotary_model,
    "dynamic": lambda **given: rotary_model(dynamic=True, **given),
    "biased": lambda **given: rotary_model(qkv_bias=True, **given),
    "learned": learned_model,
}
DECODE = {"rotary": 5, "dynamic": 5, "biased": 5, "learned": 7}
"""Launches of a layer: layer norms stay apart."""


def lowered(name: str, entry: str, kv: DType, compute: DType, format: str | None = None) -> tuple[Graph, Graph]:
    """A step under an entry point's bounds, and what runs there."""
    quant = Quantize(format, activations=KEPT) if format else None
    step = step_pipeline(kv, 16, quant).run(MODELS[name](layers=2))
    before, after = (dict(specialised(g, Limits()))[entry] for g in (step, lower(step, compute)))
    return before, entry_graph(entry, after)


def run(graph: Graph, given: Graph) -> dict[str, Array]:
    trial = random_trial(given, 3)
    weights = {v.op.label: random_parameter(v) for v in graph.params if isinstance(v.op, Leaf)}
    logits = next(v for name, v in given.outputs if name == "logits")
    rows = logits.type.concrete({n: len(trial.inputs["logit_rows"]) for n in ("outputs", "tokens")})[0]
    inputs = {**trial.inputs, "sampling": np.zeros((rows, 8), np.int64)}
    named = {v.op.label for v in graph.inputs if isinstance(v.op, Leaf)}
    results = interpret(graph, {n: v for n, v in inputs.items() if n in named}, weights, trial.states)
    return {**results.outputs, **results.states}


@pytest.mark.parametrize("entry", ["decode", "prefill"])
@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(
    ("kv", "compute", "format"),
    [
        (DType.F32, DType.F32, None),
        (DType.I8, DType.F32, None),
        (DType.F8E4M3, DType.F32, "q4"),
        (DType.F32, DType.F32, "fp8"),
        (DType.BF16, DType.BF16, None),
        (DType.BF16, DType.F16, "q8"),
    ],
    ids=str,
)
def test_the_same_function(kv: DType, compute: DType, format: str | None, name: str, entry: str) -> None:
    before, after = lowered(name, entry, kv, compute, format)
    verify(after)
    assert parse(str(after)) == after
    launched = [n for n in after.nodes if n not in after.parameter_only and not is_view(n)]
    assert all(map(has_kernel, launched))
    layer = [n for n in launched if n.loc.startswith("layers.1.")]
    extra = kv is DType.I8  # codes are appended by a kernel of their own
    assert len(layer) == (DECODE[name] + extra if entry == "decode" else 7 + extra)
    expected, given = run(before, before), run(after, before)
    assert np.array_equal(given.pop("chosen"), given["greedy"])
    for label, want in expected.items():
        close = 1e-9 if compute is DType.F32 else 2.0**-5  # what enters products is rounded, in the interpreter too
        largest = np.nanmax(np.abs(want), initial=1e-3)
        np.testing.assert_allclose(given[label], want, rtol=0, atol=close * largest, equal_nan=True, err_msg=label)


def of_one_value(result: Value, *params: Value) -> Graph:
    """A function of `x`, rows of a step's tokens."""
    return Graph("one", (ROWS,), params, (), (("y", result),), ())


ROWS = leaf("x", DType.F32, (symbol("tokens", 1, 64), 40))


@pytest.mark.parametrize("format", ["q4", "q8g128", "fp8"])
def test_a_gated_product_with_a_bias_stays_in_its_format(format: str) -> None:
    b = Emitter()
    weight, bias = (Value(Node(Param(n), (), (TensorType(DType.F32, s),))) for n, s in (("w", (96, 40)), ("b", (96,))))
    stored = b.dequantize_weight(*b.quantize_weight(weight, format=format), format=format, width=40)
    before = of_one_value(b(GatedLinear("silu", bias=True), ROWS, stored, bias), weight, bias)
    after = lower(before, DType.F32)
    made = [n.op for n in after.nodes if n not in after.parameter_only]
    assert Counter(op.name for op in made) == {"block_linear": 2, "mul": 1}
    assert [op.format for op in made if isinstance(op, BlockLinear)] == [format, format]
    inputs = {"x": np.random.default_rng(0).standard_normal((5, 40))}
    weights = {v.op.label: random_parameter(v) for v in (weight, bias) if isinstance(v.op, Leaf)}
    want, got = (interpret(g, inputs, weights).outputs["y"] for g in (before, after))
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_what_has_no_kernel_is_named() -> None:
    b = Emitter()
    b.loc = "layers.3.gate"
    message = r"^no GPU kernel for erf\(f32\[tokens, 40\]\) at layers.3.gate, a primitive op$"
    with pytest.raises(NoKernel, match=message):
        lower(of_one_value(b(Erf(), ROWS)), DType.BF16)


def test_a_product_of_groups_has_no_kernel() -> None:
    b = Emitter()
    b.loc = "layers.3.attention"
    weight = Value(Node(Param("w"), (), (TensorType(DType.F32, (4, 7, 10)),)))
    with pytest.raises(NoKernel, match=r"^no GPU kernel for grouped_linear of 4 groups at layers.3.attention$"):
        lower(of_one_value(b.grouped_linear(ROWS, weight, groups=4), weight), DType.BF16)


def test_a_mixture_of_experts_has_no_kernel_yet() -> None:
    """The message says what has none, and what it is part of."""
    graph = COMMON.run(mixture_graph())
    with pytest.raises(
        NoKernel,
        match=r"^no GPU kernel for softmax\(f32\[tokens, 6\]\) at mlp.router, a primitive op, part of routing$",
    ):
        lower(graph, DType.BF16)
    b = Emitter()
    b.loc = "layers.3.experts"
    weights = leaf("weights", DType.F32, (ROWS.type.shape[0], 6))
    stored = [
        Value(Node(Param(n), (), (TensorType(DType.F32, s),))) for n, s in (("a", (6, 10, 40)), ("b", (6, 40, 5)))
    ]
    y = b(Experts("silu"), ROWS, weights, *stored)
    graph = Graph("one", (ROWS, weights), tuple(stored), (), (("y", y),), ())
    with pytest.raises(NoKernel, match=r"^no GPU kernel for .* at layers.3.experts, a primitive op, part of experts$"):
        lower(graph, DType.BF16)


def test_attention_that_no_kernel_does() -> None:
    """Windows, caps, slopes and sinks have kernels; values of another width do not, and are named."""
    blocks, sequences = symbol("num_blocks"), symbol("sequences")
    op = PagedAttention(4, 2, 10, 0.5, window=8, alibi=True, value_dim=3)
    x, positions = ROWS, leaf("positions", DType.I32, ROWS.type.shape[:1])
    states = [leaf("key", DType.F16, (blocks, 2, 10, 16)), leaf("value", DType.F16, (blocks, 2, 16, op.value_width))]
    start = leaf("query_start", DType.I32, (sequences + 1,))
    tables = leaf("block_tables", DType.I32, (sequences, symbol("max_blocks")))
    slopes = Value(Node(Param("slopes"), (), (TensorType(DType.F32, (4,)),)))
    b = Emitter()
    b.loc = "layers.3.attention"
    result = b(op, x, *states, positions, start, tables, slopes)
    graph = Graph("one", (x, *states, positions, start, tables), (slopes,), (), (("y", result),), ())
    with pytest.raises(NoKernel, match=r"^no GPU kernel for paged_attention with value_dim=3 at layers.3.attention$"):
        lower(graph, DType.BF16)
