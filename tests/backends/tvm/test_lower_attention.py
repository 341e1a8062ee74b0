"""Attention lowered, and in its decode form: the same function, for any split of the context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from llmc.backends.tvm.attention_ops import SplitAttention
from llmc.backends.tvm.lower import lower
from llmc.backends.tvm.lower_attention import entry_graph
from llmc.backends.tvm.splits import MOST_SPLITS, SEGMENT, split_length
from llmc.entries import specialised
from llmc.ir.graph import Graph, Leaf
from llmc.ir.interpret import interpret
from llmc.ir.op import Array, Node
from llmc.ir.text import parse
from llmc.ir.types import DType
from llmc.ir.verify import verify
from llmc.options import Limits
from llmc.passes.pipelines import step_pipeline
from llmc.passes.trials import random_parameter, random_trial
from tests.passes.graphs import learned_model, rotary_model

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
