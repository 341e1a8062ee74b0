"""A mixture of experts lowered: the same function, and its kernels one after another on what the pack program makes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from llmc.backends.base import SYMBOLS
from llmc.backends.buffers import is_view, linear_cost
from llmc.backends.tvm.code import MAKERS
from llmc.backends.tvm.lower import lower
from llmc.backends.tvm.select import select
from llmc.ir.graph import Graph, Leaf
from llmc.ir.interpret import evaluate_parameters, interpret
from llmc.ir.op import Array, Value
from llmc.ir.ops.experts import Experts
from llmc.ir.ops.routing import Routing
from llmc.ir.text import parse
from llmc.ir.types import DType
from llmc.ir.verify import verify
from llmc.passes.pipelines import model_pipeline
from llmc.passes.quantize import Quantize
from llmc.passes.trials import random_parameter
from tests.backends.tvm.machine import V3, Guarded, Kernel, needs_v3, same_bits
from tests.passes.experts import CLAMPED, GROUPED, PLAIN, SILU, mixture_graph

CASES = {
    "plain": (PLAIN, SILU),
    "biased": (GROUPED, replace(Experts("gelu_tanh"), bias=True)),
    "clamped": (GROUPED, CLAMPED),
}
cases = pytest.mark.parametrize("case", sorted(CASES))
formats = pytest.mark.parametrize("format", ["none", "q4", "q8"])


def graphs(
    routing: Routing, op: Experts, format: str, weights: DType, hidden: int = 40, inner: int = 33
) -> tuple[Graph, Graph]:
    """What the passes make, and what runs."""
    quant = None if format == "none" else Quantize(format)
    before = model_pipeline(quant).run(mixture_graph(routing, op, weights, hidden, 6, inner))
    return before, lower(before, 64)


def weights_of(graph: Graph) -> dict[str, Array]:
    """As a checkpoint stores them."""
    return {v.op.label: v.type.dtype.store(random_parameter(v)) for v in graph.params if isinstance(v.op, Leaf)}


@cases
@formats
def test_the_same_function(case: str, format: str) -> None:
    before, after = graphs(*CASES[case], format, DType.BF16)
    verify(after)
    counts = Counter(n.op.name for n in after.nodes if n not in after.parameter_only)
    products = ("tiled_experts_gated_linear", "tiled_experts_linear", "group_tiles", "quantize_tiles")
    if format == "none":
        products = ("packed_experts_gated_linear", "packed_experts_linear", "group_rows")
    assert counts == Counter(("packed_linear", "routing", *products, "combine_experts"))
    x = np.random.default_rng(0).standard_normal((7, 40))
    got, want = (interpret(g, {"x": x}, weights_of(before)).outputs["out"] for g in (after, before))
    # What quantizes between two products rounds once more; a last place may take a code to its neighbour.
    np.testing.assert_allclose(got, want, rtol=0, atol=(1e-12 if format == "none" else 1e-4) * np.abs(want).max())
    assert parse(str(after)) == after


def run_kernels(graph: Graph, x: Array, weights: dict[str, Array], tasks: int) -> Array:
    """The result of a lowered graph of one input, kernel by kernel, in buffers full of NaN."""
    sizes = {name: len(x) if name == "tokens" else 7 for name in SYMBOLS}
    values: dict[Value, Array] = {}

    def array(value: Value) -> Array:
        if value not in values:
            values[value] = evaluate_parameters(value, weights.__getitem__)
        return values[value]

    values[next(v for v in graph.inputs if v.op.label == "x")] = x  # type: ignore[attr-defined]
    for node in graph.nodes:
        if node in graph.parameter_only:
            continue
        if is_view(node):
            values[node.results[0]] = array(node.inputs[0]).reshape(node.types[0].concrete(sizes))
            continue
        chosen = select(node)
        assert chosen is not None
        outputs = {v: Guarded(v.type.concrete(sizes), v.type.dtype.numpy) for v in node.results}
        given = [outputs[v] if v in outputs else array(v) for v in chosen.arguments]
        kernel = Kernel(MAKERS[chosen.spec.kind], V3, **dict(chosen.spec.parameters))
        kernel([sizes[name] for name in SYMBOLS], given, tasks)
        values.update({v: g.array for v, g in outputs.items()})
    return values[graph.outputs[0][1]]


@needs_v3
@cases
@formats
@pytest.mark.parametrize("dtype", [DType.F32, DType.F16, DType.BF16], ids=str)
def test_kernels_one_after_another(case: str, format: str, dtype: DType) -> None:
    before, after = graphs(*CASES[case], format, dtype)
    weights = weights_of(before)
    x = np.random.default_rng(1).standard_normal((40, 40)).astype(np.float32)
    truth = interpret(before, {"x": x}, weights).outputs["out"]
    y = run_kernels(after, x, weights, 3)
    if format == "none":
        np.testing.assert_allclose(y, truth, rtol=0, atol=2e-6 * np.abs(truth).max())
    else:
        # The same codes but for roundings to a neighbour between the products: half a step of 1/127.
        np.testing.assert_allclose(y, truth, rtol=0, atol=0.5 / 127 * np.abs(truth).max())
    for tokens in (slice(0, 1), slice(39, 40), slice(3, 10)):
        assert same_bits(run_kernels(after, x[tokens], weights, 1), y[tokens])


@needs_v3
@formats
def test_experts_that_nobody_chose_are_not_read(format: str) -> None:
    """A bias of the choice keeps all tokens to the last three experts; the others' weights are NaN, or their scales."""
    before, after = graphs(replace(PLAIN, bias=True), SILU, format, DType.F32)
    weights = weights_of(before)
    weights["mlp.router.bias"] = np.array([-9, -9, -9, 9, 9, 9], np.float32)
    x = np.random.default_rng(2).standard_normal((13, 40)).astype(np.float32)
    want = run_kernels(after, x, weights, 2)
    poisoned = {**weights}
    for name in ("mlp.experts.gate_up", "mlp.experts.down"):
        poisoned[name] = weights[name].copy()
        poisoned[name][:3] = np.nan if format == "none" else 1e4
    assert same_bits(run_kernels(after, x, poisoned, 2), want)


def test_costs_of_launches_are_of_chosen_experts() -> None:
    """One token reads two of six experts, whatever the launch."""
    for format, dtype in (("none", 2), ("q8", 1)):
        _, after = graphs(PLAIN, SILU, format, DType.BF16, 64, 32)
        found = {n.op.name: linear_cost(n, "bytes") for n in after.nodes}
        for name, elements in (("experts_gated_linear", 2 * 64 * 64), ("experts_linear", 2 * 64 * 32)):
            (cost,) = (v for k, v in found.items() if k.removeprefix("packed_").removeprefix("tiled_") == name)
            scales = elements // 32 * 2 if format == "q8" else 0
            assert elements * dtype + scales < sum(cost) < (elements * dtype + scales) * 1.3
