"""Attention lowered, and in its decode form: the same function, for any split of the context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from llmc.backends.tvm.attention_ops import SplitAttention
from llmc.backends.tvm.lower import lower
from llmc.backends.tvm.lower_attention import entry_graph
from llmc.backends.tvm.splits import MOST_SPLITS, SEGMENT, split_length
from llmc.entries import specialised
from llmc.ir.errors import NoKernel
from llmc.ir.graph import Graph, Leaf, Param
from llmc.ir.interpret import interpret
from llmc.ir.op import Array, Emitter, Node, Value
from llmc.ir.ops.attention import Attention, PagedAttention
from llmc.ir.text import parse
from llmc.ir.types import DType, TensorType
from llmc.ir.verify import verify
from llmc.options import Limits
from llmc.passes.pipelines import step_pipeline
from llmc.passes.quantize import KEPT, Quantize
from llmc.passes.trials import random_parameter, random_trial
from tests.passes.graphs import Model, learned_model, rotary_model

MODELS: dict[str, Callable[..., Graph]] = {"rotary": rotary_model, "learned": learned_model}
LONGEST = 64


def lowered(name: str, entry: str, kv: DType = DType.F32) -> tuple[Graph, Graph]:
    """A step under an entry point's bounds, and what runs there."""
    step = step_pipeline(kv, 4).run(MODELS[name](layers=2))
    before, after = (dict(specialised(g, Limits()))[entry] for g in (step, lower(step, LONGEST)))
    return before, entry_graph(entry, after, LONGEST)


def run(graph: Graph, given: Graph) -> list[Array]:
    trial = random_trial(given, 3)
    weights = {v.op.label: random_parameter(v) for v in graph.params if isinstance(v.op, Leaf)}
    results = interpret(graph, trial.inputs, weights, trial.states)
    return [*results.outputs.values(), *results.states.values()]


@pytest.mark.parametrize("entry", ["decode", "prefill"])
@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("kv", [DType.F32, DType.I8])
def test_the_same_function(kv: DType, name: str, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmc.backends.tvm.lower_attention.split_length", lambda longest: 7)
    before, after = lowered(name, entry, kv)
    verify(after)
    counts = Counter(n.op.name for n in after.nodes)
    if entry == "decode":
        assert counts["split_attention"] == counts["combine_splits"] == 2
        assert {n.op.splits for n in after.nodes if isinstance(n.op, SplitAttention)} == {-(-LONGEST // 7)}
    else:
        assert counts["append_keys"] == counts["rotated_attention"] == 2
    assert not counts.keys() & {"rope", "rope_append", "qkv_append", "paged_attention"}
    for got, want in zip(run(after, before), run(before, before), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert parse(str(after)) == after


def test_cost_grows_with_the_context_alone() -> None:
    """Partial results have room for the longest context; what a step moves is counted by its own."""
    _, after = lowered("rotary", "decode")

    def traffic(node: Node, blocks: int) -> int:
        sizes = {"tokens": 1, "max_blocks": blocks, "num_blocks": 1}
        return node.op.cost(*(v.type.substitute(dict(sizes)) for v in node.inputs)).bytes

    node = next(n for n in after.nodes if isinstance(n.op, SplitAttention))
    key = next(v for v in node.inputs if v in after.states).type
    one_block = 2 * key.substitute({"num_blocks": 1}).bytes + 2 * 4  # keys and values, and an entry of the table
    assert traffic(node, 3) - traffic(node, 2) <= one_block
    assert traffic(node, 1) < 4 * one_block


@pytest.mark.parametrize("longest", [1, 256, 32768, 32769, 131072, 10**6])
def test_split_length(longest: int) -> None:
    split = split_length(longest)
    assert split % SEGMENT == 0
    assert -(-longest // split) <= MOST_SPLITS
    assert split == SEGMENT or -(-longest // (split - SEGMENT)) > MOST_SPLITS


def kinds(model: str, kv: DType, **attributes: object) -> Graph:
    """A step whose attentions have other attributes; slopes and sinks are parameters."""
    step = step_pipeline(kv, 4).run(MODELS[model](layers=1))
    heads = next(n.op.num_heads for n in step.nodes if isinstance(n.op, PagedAttention))
    vectors = {n: Value(Node(Param(n), (), (TensorType(DType.F32, (heads,)),))) for n in ("slopes", "sinks")}

    def emit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        b = Emitter()
        b.loc = node.loc
        if not isinstance(node.op, PagedAttention):
            return b.make(node.op, inputs).results
        op = replace(node.op, **attributes)  # type: ignore[arg-type]
        return b.make(op, (*inputs, *(vectors[n] for n in op.per_head))).results

    return replace(step.map(emit), params=(*step.params, *vectors.values()))


@pytest.mark.parametrize("entry", ["decode", "prefill"])
@pytest.mark.parametrize(
    ("model", "kv", "attributes"),
    [
        ("rotary", DType.F32, {"window": 3}),
        ("rotary", DType.I8, {"window": 9, "sinks": True}),
        ("learned", DType.F32, {"soft_cap": 0.75, "alibi": True}),
        ("learned", DType.I8, {"window": 11, "soft_cap": 0.75, "alibi": True, "sinks": True}),
    ],
)
def test_kinds(
    model: str, kv: DType, attributes: dict[str, object], entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, caps, slopes and sinks mean in kernels' ops what they mean in the op that is lowered."""
    monkeypatch.setattr("llmc.backends.tvm.lower_attention.split_length", lambda longest: 7)
    step = kinds(model, kv, **attributes)
    before, after = (dict(specialised(g, Limits()))[entry] for g in (step, lower(step, LONGEST)))
    after = entry_graph(entry, after, LONGEST)
    verify(after)
    assert not {n.op.name for n in after.nodes} & {"paged_attention", "qkv_append", "rope_append"}
    for got, want in zip(run(after, before), run(before, before), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert parse(str(after)) == after


def apart(b: Model, width: int, value_width: int) -> Graph:
    """A step of one layer whose keys and values have other widths, and are no slices of one projection."""
    x = b.embedding(b.token_ids, b.param("embed.weight", DType.F32, (11, 16)), dtype=DType.F32)
    q, k = b.project("query", x, 4 * width), b.project("key", x, 2 * width)
    v = b.mul(b.project("value", x, 2 * value_width), b.project("gate", x, 2 * value_width))
    op = Attention(4, 2, width, 0.5, value_dim=value_width)
    y = b.project("output", b.primitive(op, q, k, v, b.positions), 11)
    return step_pipeline(DType.F32, 4).run(b.graph({"logits": y}))


@pytest.mark.parametrize("entry", ["decode", "prefill"])
def test_values_of_another_width(entry: str) -> None:
    step = apart(Model(), 6, 4)
    before, after = (dict(specialised(g, Limits()))[entry] for g in (step, lower(step, LONGEST)))
    after = entry_graph(entry, after, LONGEST)
    verify(after)
    assert {"concat", "append_keys" if entry == "prefill" else "split_attention"} <= {n.op.name for n in after.nodes}
    for got, want in zip(run(after, before), run(before, before), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("model", "append"), [("rotary", "rope_append"), ("learned", "qkv_append")])
def test_no_kernel_stores_8_bit_floats(model: str, append: str) -> None:
    step = step_pipeline(DType.F8E4M3, 4).run(MODELS[model](layers=1))
    assert {v.type.dtype for v in step.states} == {DType.F8E4M3}
    with pytest.raises(NoKernel, match=f"^no CPU kernel for {append} into states of f8e4m3 at layers.0.attention$"):
        lower(step, LONGEST)


@pytest.mark.parametrize("name", ["q4g64", "fp8"])
def test_no_kernel_reads_a_table_in_a_format_for_gpus(name: str) -> None:
    quant = Quantize("none", "none", name, KEPT)
    step = step_pipeline(DType.F16, 4, quant).run(learned_model(layers=1))
    with pytest.raises(
        NoKernel, match=f"^no CPU kernel for quantized_embedding of weights in {name} at .*CPUs take q8, q4$"
    ):
        lower(step, LONGEST)
