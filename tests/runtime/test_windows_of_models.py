"""Models whose layers have windows, from the graph to completions: as the model itself, without paged memory."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.backends.buffers import linear_cost, window_of
from llmc.contents import state_sizes
from llmc.ir.graph import Graph, Leaf
from llmc.ir.interpret import interpret
from llmc.ir.op import Array
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.types import DType
from llmc.options import Limits
from llmc.passes.pipelines import step_pipeline
from llmc.passes.trials import random_parameter
from llmc.runtime.errors import ModelError
from llmc.runtime.kv_cache import blocks_of_window
from llmc.runtime.model import Model
from tests.passes.graphs import rotary_model
from tests.runtime.interpreted_step import InterpretedExecutor, interpreted

BLOCK, LIMITS, LONGEST = 4, Limits(tokens=8, sequences=3, outputs=8), 64
CASES = {"mixed": (6, 0, 3), "one window": (5, 5), "no full layer": (3, 9)}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Graph, dict[str, Array], Model, tuple[int, ...]]:
    windows = CASES[request.param]
    graph = rotary_model(layers=len(windows), windows=windows)
    params = {v.op.label: random_parameter(v) for v in graph.params if isinstance(v.op, Leaf)}
    step = step_pipeline(DType.F32, BLOCK).run(graph)
    return graph, params, interpreted(step, params, LIMITS, LONGEST), windows


def expected(graph: Graph, params: dict[str, Array], ids: list[int]) -> Array:
    return interpret(graph, {"token_ids": np.array(ids), "positions": np.arange(len(ids))}, params).outputs["logits"]


def test_logits_across_the_windows(case: tuple[Graph, dict[str, Array], Model, tuple[int, ...]]) -> None:
    graph, params, model, _ = case
    ids = np.random.default_rng(0).integers(0, 11, 50).tolist()
    np.testing.assert_allclose(model.logits(ids), expected(graph, params, ids), rtol=1e-5, atol=1e-6)


def test_completions_and_memory(case: tuple[Graph, dict[str, Array], Model, tuple[int, ...]]) -> None:
    graph, params, model, windows = case
    prompts = [np.random.default_rng(i).integers(0, 11, n).tolist() for i, n in enumerate((30, 3, 41, 17))]
    for prompt, completion in zip(prompts, model.generate(prompts, 6), strict=True):
        ids = list(prompt)
        for token in completion.token_ids:
            assert token == expected(graph, params, ids)[-1].argmax()
            ids.append(token)
    executor = model._engine.executor
    assert isinstance(executor, InterpretedExecutor)
    for spec in executor.head.states:
        window = executor.groups[spec.group].window
        touched = int((~np.isnan(executor.states[spec.name]).all((1, 2, 3))).sum())
        assert not window or touched <= LIMITS.sequences * blocks_of_window(window, LIMITS.tokens, BLOCK)
    assert {executor.groups[s.group].window for s in executor.head.states} == set(windows)


def test_forks_and_rollbacks(case: tuple[Graph, dict[str, Array], Model, tuple[int, ...]]) -> None:
    graph, params, model, _ = case
    ids = np.random.default_rng(1).integers(0, 11, 40).tolist()
    with model.sequence() as sequence:
        sequence.prefill(ids[:30])
        with sequence.fork() as other:
            sequence.prefill(ids[30:])
            other.prefill([7] * 9)
            for held in (sequence, other):
                row = held.step(2).logits[0]
                np.testing.assert_allclose(
                    row, expected(graph, params, held.token_ids)[-1], rtol=1e-5, atol=1e-6, err_msg=str(held.token_ids)
                )
        sequence.truncate(sequence.length - LIMITS.tokens)
        row = sequence.prefill([3, 4]).logits[0]
        np.testing.assert_allclose(row, expected(graph, params, [*ids[:33], 3, 4])[-1], rtol=1e-5, atol=1e-6)
        with pytest.raises(ModelError, match="cannot roll back from 35 tokens to 10"):
            sequence.truncate(10)


def test_costs_of_a_window() -> None:
    """Per token of context as without one; how much context counts, the launch says."""
    step = step_pipeline(DType.F16, 16).run(rotary_model(layers=2, windows=(20, 0)))
    windowed, full = (node for node in step.nodes if isinstance(node.op, PagedAttention))
    assert (window_of(windowed), window_of(full), window_of(step.nodes[0])) == (20, 0, 0)
    for what in ("flops", "bytes"):
        assert linear_cost(windowed, what) == linear_cost(full, what) and linear_cost(full, what)[2] > 0


def test_sizes_of_states() -> None:
    step = step_pipeline(DType.F16, 16).run(rotary_model(layers=3, windows=(100, 0, 20)))
    layer = 2 * 2 * 2 * 4  # keys and values of two heads, in two bytes each
    assert state_sizes(step, 16) == {"kv_bytes_per_token": layer, "kv_bytes_of_windows": 120 * layer}
