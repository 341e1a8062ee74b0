"""Attention over a latent: what fires computes the same, and what must not fire says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.importers.hf import import_model
from llmc.ir.graph import Graph
from llmc.ir.interpret import interpret
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.attention import Attention
from llmc.ir.ops.rope import Rope
from llmc.ir.types import DType
from llmc.passes.base import PassContext
from llmc.passes.observe import NumericsCheck, Verifier, together
from llmc.passes.pipelines import entry_pipeline, read_pipeline, step_pipeline
from tests.latent_models import CASES, SIZES, write_description
from tests.passes.graphs import F32, Model, counts, latent_attention
from tests.tiny_models import make_model, save


def absorbed(graph: Graph) -> tuple[Graph, PassContext]:
    context = PassContext()
    observer = together(Verifier(), NumericsCheck())
    return read_pipeline("absorb-latent,canonicalize").run(graph, context, observer), context


@pytest.mark.parametrize(
    "scores",
    [{}, {"window": 3, "soft_cap": 0.75}, {"alibi": True, "sinks": True}, {"rotated": True}],
    ids=["plain", "window and cap", "slopes and sinks", "rotated"],
)
@pytest.mark.parametrize("weights", [F32, DType.BF16])
def test_numbers_stay(scores: dict[str, Any], weights: DType) -> None:
    b, scores = Model(), dict(scores)
    out = latent_attention(b, weights=weights, **scores)
    graph, context = absorbed(b.graph({"out": out}))
    assert context.counts["absorb-latent"] == 1
    assert counts(graph)["grouped_linear"] == 2 and not counts(graph)["linear"] and not counts(graph)["expand"]
    (node,) = (n for n in graph.nodes if isinstance(n.op, Attention))
    rotated = scores.pop("rotated", False)
    assert node.op == Attention(4, 1, 7, 0.5, value_dim=5, **scores)
    assert [v.op.name for v in node.inputs[:2]] == (["rope", "rope"] if rotated else ["reshape", "concat"])


def test_rotations_that_differ_stay_where_they_are() -> None:
    """Queries by other tables than keys: what is rotated is joined as it is."""
    b = Model()
    out = latent_attention(b, rotated=True)
    graph = b.graph({"out": out})
    sines = b.input("other", F32, (b.tokens, 1))
    turned = next(n for n in graph.nodes if n.op == Rope(4, 2, 2))

    def emit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        given = (*inputs[:2], sines) if node is turned else inputs
        return Emitter().make(node.op, given).results

    graph = graph.map(emit, inputs=(*graph.inputs, sines))
    after, context = absorbed(graph)
    assert context.counts["absorb-latent"] == 1
    (node,) = (n for n in after.nodes if isinstance(n.op, Attention))
    assert [v.op.name for v in node.inputs[:2]] == ["reshape", "concat"]


def test_several_products_and_no_shared_elements() -> None:
    """Keys and values by a linear each, and a key that is nothing but its product."""
    b = Model()
    q, c = b.input("q", F32, (b.tokens, 12)), b.input("c", F32, (b.tokens, 4))
    k, v = (b.linear(c, b.param(name, F32, (12, 4))) for name in ("key", "value"))
    out = b.attention(q, k, v, b.positions, num_heads=3, num_kv_heads=3, head_dim=4, scale=0.5)
    graph, context = absorbed(b.graph({"out": out}))
    assert context.counts["absorb-latent"] == 1
    assert counts(graph)["concat"] == 0 and counts(graph)["grouped_linear"] == 2


def test_a_key_that_ends_with_its_product() -> None:
    """Shared elements come first; two of them at different places."""
    b = Model()
    t = b.tokens
    q, c = b.input("q", F32, (t, 18)), b.input("c", F32, (t, 4))
    shares = [b.expand(b.input(f"s{i}", F32, (t, 1, 1)), shape=(t, 3, 1)) for i in range(2)]
    k, v = (b.reshape(b.linear(c, b.param(name, F32, (12, 4))), shape=(t, 3, 4)) for name in ("key", "value"))
    k = b.reshape(b.concat(shares[0], k, shares[1], axis=2), shape=(t, 18))
    out = b.attention(
        q, k, b.reshape(v, shape=(t, 12)), b.positions, num_heads=3, num_kv_heads=3, head_dim=6, scale=0.5, value_dim=4
    )
    _, context = absorbed(b.graph({"out": out}))
    assert context.counts["absorb-latent"] == 1


def other_latent(b: Model) -> Value:
    q, c, d = (b.input(n, F32, (b.tokens, w)) for n, w in (("q", 12), ("c", 4), ("d", 4)))
    k, v = (b.linear(x, b.param(name, F32, (12, 4))) for x, name in ((c, "key"), (d, "value")))
    result: Value = b.attention(q, k, v, b.positions, num_heads=3, num_kv_heads=3, head_dim=4, scale=0.5)
    return result


def grouped(b: Model) -> Value:
    q, c = b.input("q", F32, (b.tokens, 24)), b.input("c", F32, (b.tokens, 4))
    k, v = (b.linear(c, b.param(name, F32, (12, 4))) for name in ("key", "value"))
    result: Value = b.attention(q, k, v, b.positions, num_heads=6, num_kv_heads=3, head_dim=4, scale=0.5)
    return result


def biased(b: Model) -> Value:
    q, c = b.input("q", F32, (b.tokens, 12)), b.input("c", F32, (b.tokens, 4))
    k = b.linear(c, b.param("key", F32, (12, 4)), b.param("bias", F32, (12,)), bias=True)
    v = b.linear(c, b.param("value", F32, (12, 4)))
    result: Value = b.attention(q, k, v, b.positions, num_heads=3, num_kv_heads=3, head_dim=4, scale=0.5)
    return result


def own_values(b: Model) -> Value:
    q, c, v = (b.input(n, F32, (b.tokens, w)) for n, w in (("q", 12), ("c", 4), ("v", 12)))
    k = b.linear(c, b.param("key", F32, (12, 4)))
    result: Value = b.attention(q, k, v, b.positions, num_heads=3, num_kv_heads=3, head_dim=4, scale=0.5)
    return result


def own_rest(b: Model) -> Value:
    """What stands beside the product is each head's own."""
    t = b.tokens
    q, c, own = b.input("q", F32, (t, 15)), b.input("c", F32, (t, 4)), b.input("own", F32, (t, 3, 1))
    k, v = (b.linear(c, b.param(name, F32, (12, 4))) for name in ("key", "value"))
    k = b.reshape(b.concat(b.reshape(k, shape=(t, 3, 4)), own, axis=2), shape=(t, 15))
    result: Value = b.attention(q, k, v, b.positions, num_heads=3, num_kv_heads=3, head_dim=5, scale=0.5, value_dim=4)
    return result


def two_products(b: Model) -> Value:
    t = b.tokens
    q, c = b.input("q", F32, (t, 24)), b.input("c", F32, (t, 4))
    k1, k2, v = (b.reshape(b.linear(c, b.param(name, F32, (12, 4))), shape=(t, 3, 4)) for name in ("a", "b", "v"))
    k, v = b.reshape(b.concat(k1, k2, axis=2), shape=(t, 24)), b.reshape(v, shape=(t, 12))
    result: Value = b.attention(q, k, v, b.positions, num_heads=3, num_kv_heads=3, head_dim=8, scale=0.5, value_dim=4)
    return result


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda b: latent_attention(b, rank=17), "would take 36 elements, no less than the 36 that it takes now"),
        (other_latent, "keys and values are products with two different values"),
        (grouped, "6 query heads share 3 heads of keys"),
        (biased, "the product that makes keys is Linear(bias=True"),
        (own_values, "values are no products with a latent: found input"),
        (own_rest, "keys are no products with a latent: found input"),
        (two_products, "2 parts of the keys are products with a latent, want one"),
    ],
)
def test_near_misses(build: Callable[[Model], Value], reason: str) -> None:
    b = Model()
    graph = b.graph({"out": build(b)})
    context = PassContext()
    assert read_pipeline("absorb-latent").run(graph, context) == graph
    assert reason in str(context.refusals["absorb-latent"][0])


def test_one_element_less_is_enough() -> None:
    b = Model()
    _, context = absorbed(b.graph({"out": latent_attention(b, rank=16)}))
    assert context.counts["absorb-latent"] == 1


def test_the_weight_is_cut_when_it_is_packed() -> None:
    """What is left to do at each step reads rows of the weight, made of parameters alone."""
    b = Model()
    graph, _ = absorbed(b.graph({"out": latent_attention(b)}))
    for node in graph.nodes:
        if node.op.name == "grouped_linear":
            assert node.inputs[1].node in graph.parameter_only
    rng = np.random.default_rng(0)
    inputs = {"token_ids": np.zeros(9, int), "positions": np.arange(9)}
    inputs |= {name: rng.standard_normal((9, width)) for name, width in (("q", 24), ("c", 5), ("shared", 2))}
    weight = rng.standard_normal((28, 5)).astype(np.float32)
    out = interpret(graph, inputs, lambda _: weight).outputs["out"]
    heads = (inputs["c"] @ weight.T.astype(float)).reshape(9, 4, 7)
    keys = np.concatenate([heads[..., :4], np.repeat(inputs["shared"][:, None], 4, 1)], 2)
    scores = np.einsum("thd,shd->hts", inputs["q"].reshape(9, 4, 6), keys) * 0.5
    scores[:, np.triu(np.ones((9, 9), bool), 1)] = -np.inf
    mixed = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert np.allclose(out, np.einsum("hts,shd->thd", mixed, heads[..., 4:]).reshape(9, 12), rtol=1e-9)


def test_absorbed_weights_keep_their_dtype() -> None:
    b = Model()
    out = b.linear(latent_attention(b, weights=DType.BF16), b.param("output.weight", DType.BF16, (8, 12)))
    graph = read_pipeline("absorb-latent,canonicalize,quantize{format=q4}").run(b.graph({"out": out}))
    assert counts(graph)["quantized_linear"] == 1 and counts(graph)["grouped_linear"] == 2
    weights = [n.inputs[1].type.dtype for n in graph.nodes if n.op.name == "grouped_linear"]
    assert weights == [DType.BF16, DType.BF16]


@pytest.mark.parametrize("case", ["two latents", "one latent, yarn", "complex rotation", "halves"])
def test_whole_models(case: str, tmp_path: Path) -> None:
    """From primitive ops to a step: every pass leaves the numbers as they are, and a token's state is narrow."""
    model_type, changes = CASES[case]
    theirs = make_model(model_type, **{**SIZES, **changes})
    ours = import_model(save(theirs, tmp_path), architecture=write_description(tmp_path))
    context = PassContext()
    observer = together(Verifier(), NumericsCheck(ours.weights.load))
    step = step_pipeline(F32).run(ours.graph, context, observer)
    fired = {name: context.counts[name] for name in ("attention", "absorb-latent")}
    assert fired == {"attention": 2, "absorb-latent": 2}
    assert sum(n for name, n in context.counts.items() if name.startswith("rope")) == 4
    assert counts(step)["grouped_linear"] == 4 and counts(step)["paged_attention"] == 2
    assert counts(step)["rope_append"] == 2 and not counts(step)["rope"]
    rank = theirs.config.kv_lora_rank
    shapes = [v.type.shape[1:] for v in step.states[:2]]
    assert shapes == [(1, rank + 6, 16), (1, 16, rank)]
    for entry in ("decode", "prefill"):
        entry_pipeline(entry).run(step, observer=observer)
