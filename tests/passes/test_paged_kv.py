"""A step over a ragged batch gives each sequence what the model gives it alone, whatever its blocks hold beside."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph, Leaf, State, StateInput
from llmc.ir.interpret import interpret
from llmc.ir.op import Array, Value
from llmc.ir.ops.attention import Attention, PagedAttention
from llmc.ir.ops.quantized_experts import QuantizedExperts
from llmc.ir.types import DType, TensorType, symbol
from llmc.ir.verify import verify
from llmc.passes.base import PassContext
from llmc.passes.observe import with_wide_states
from llmc.passes.paged_kv import PagedKv
from llmc.passes.pipelines import COMMON, read_pipeline, step_pipeline
from llmc.passes.trials import random_parameter
from tests.passes.graphs import F32, Model, learned_model, rotary_model

BLOCK = 4


def parameters(graph: Graph) -> dict[str, Array]:
    return {v.op.label: random_parameter(v) for v in graph.params if isinstance(v.op, Leaf)}


MODELS = {name: model(layers=2) for name, model in (("rotary", rotary_model), ("learned", learned_model))}
MODELS |= {"windowed": rotary_model(layers=3, windows=(3, 0, 6)), "one window": rotary_model(windows=(5, 5))}
STEPS = {
    (name, kv): with_wide_states(step_pipeline(kv, BLOCK).run(g))
    for name, g in MODELS.items()
    for kv in (DType.F32, DType.I8)
}


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(MODELS)),
    kv=st.sampled_from([DType.F32, DType.I8]),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    chunk=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_ragged_batches_equal_sequences_alone(name: str, kv: DType, lengths: list[int], chunk: int, seed: int) -> None:
    """Prompts are fed in chunks, all sequences together; blocks are shuffled and what nobody owns, or no window shows,
    is NaN."""
    rng = np.random.default_rng(seed)
    model, step = MODELS[name], STEPS[name, kv]
    weights = parameters(model)
    ids = [rng.integers(0, 11, n) for n in lengths]
    alone = [interpret(model, {"token_ids": i, "positions": np.arange(len(i))}, weights).outputs["logits"] for i in ids]
    blocks = [-(-n // BLOCK) for n in lengths]
    count = sum(blocks) + 2
    tables = {}
    for group in step.layer_groups:
        free = list(rng.permutation(count))
        tables[group] = rng.integers(0, count, (len(ids), max(blocks)))
        for s, needed in enumerate(blocks):
            tables[group][s, :needed] = [free.pop() for _ in range(needed)]
    counts = {group.num_blocks: count for group in step.layer_groups}
    kinds = {v.op.state.name: v.op.state for v in step.states if isinstance(v.op, StateInput)}
    states = {v.op.label: np.full(v.type.concrete(counts), np.nan) for v in step.states if isinstance(v.op, StateInput)}
    for start in range(0, max(lengths), chunk):
        running = [s for s, n in enumerate(lengths) if n > start]
        stops = [min(lengths[s], start + chunk) for s in running]
        positions = np.concatenate([np.arange(start, stop) for stop in stops])
        owner = np.repeat(running, [stop - start for stop in stops])
        inputs = {
            "token_ids": np.concatenate([ids[s][start:stop] for s, stop in zip(running, stops, strict=True)]),
            "positions": positions,
            "query_start": np.cumsum([0, *(stop - start for stop in stops)]),
            "logit_rows": rng.permutation(len(positions)),
        }
        for group, table in tables.items():
            inputs[group.slot_mapping] = table[owner, positions // BLOCK] * BLOCK + positions % BLOCK
            inputs[group.block_tables] = table[running]
            passed: Array | list[int] = (
                table[running, : max(0, start - group.window + 1) // BLOCK] if group.window else []
            )
            for state in states:
                if kinds[state].window == group.window:
                    states[state][passed] = np.nan
        result = interpret(step, inputs, weights, states)
        states = result.states
        expected = np.stack([alone[owner[row]][positions[row]] for row in inputs["logit_rows"]])
        np.testing.assert_allclose(result.outputs["logits"], expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(result.outputs["greedy"], result.outputs["logits"].argmax(-1))


def test_the_interface() -> None:
    graph = read_pipeline("paged-kv{block_size=8,dtype=bf16}").run(COMMON.run(rotary_model(layers=2)))
    assert [getattr(v.op, "label", None) for v in graph.inputs] == [
        "token_ids",
        "positions",
        "slot_mapping",
        "query_start",
        "block_tables",
        "logit_rows",
    ]
    assert [name for name, _ in graph.outputs] == ["logits", "greedy"]
    assert [str(v.type) for _, v in graph.outputs] == ["f32[outputs, 11]", "i32[outputs]"]
    assert str(graph.leaf("query_start").type) == "i32[sequences + 1]"
    states = [v.op.state for v in graph.states if isinstance(v.op, StateInput)]
    assert [s.name for s in states[:2]] == ["layers.0.attention.key", "layers.0.attention.value"]
    assert [list(map(str, s.shape)) for s in states[:2]] == [
        ["num_blocks", "2", "4", "8"],
        ["num_blocks", "2", "8", "4"],
    ]
    assert {s.dtype for s in states} == {DType.BF16}
    assert all(s.max is None for s in graph.symbols.values())


def test_groups_of_layers() -> None:
    graph = PagedKv(8, DType.BF16).run(COMMON.run(rotary_model(layers=4, windows=(24, 0, 8, 24))), PassContext())
    assert [getattr(v.op, "label", None) for v in graph.inputs][2:] == [
        "slot_mapping",
        "query_start",
        "block_tables",
        "slot_mapping_window_8",
        "block_tables_window_8",
        "slot_mapping_window_24",
        "block_tables_window_24",
        "logit_rows",
    ]
    states = [v.op.state for v in graph.states if isinstance(v.op, StateInput)]
    assert [s.layer_group for s in states[::2]] == ["window_24", "full", "window_8", "window_24"]
    assert [str(s.shape[0]) for s in states[::2]] == [
        f"num_blocks{n}" for n in ("_window_24", "", "_window_8", "_window_24")
    ]
    assert [n.op.window for n in graph.nodes if isinstance(n.op, PagedAttention)] == [24, 0, 8, 24]
    for node in graph.nodes:
        if isinstance(node.op, PagedAttention) and node.op.window == 8:
            assert node.inputs[-1] == graph.leaf("block_tables_window_8")
    verify(graph)


def test_one_group_has_plain_names() -> None:
    graph = PagedKv().run(COMMON.run(rotary_model(windows=(5, 5))), PassContext())
    assert not [v for v in graph.inputs if "window" in getattr(v.op, "label", "")]
    assert {v.op.state.layer_group for v in graph.states if isinstance(v.op, StateInput)} == {"window_5"}


def test_a_layer_group_that_nobody_knows() -> None:
    with pytest.raises(
        LlmcError, match=r"state 'key': the layer group is 'ring', expected 'full' or 'window_<tokens>'"
    ):
        _ = State("key", "paged_kv", F32, (1, 2), "ring").window


def test_rows_are_gathered_before_the_last_norm() -> None:
    graph = step_pipeline(DType.F32).run(rotary_model())
    (gather,) = [n for n in graph.nodes if n.op.name == "gather_rows"]
    assert [n.op.name for n, _ in graph.uses[gather.results[0]]] == ["rms_norm"]
    assert gather.inputs[0].op.name == "linear"


def test_rows_are_gathered_through_an_operand_in_any_place() -> None:
    """The operand that carries tokens is the second one here."""
    b = Model()
    logits = b.mul(b.weight(8), b.sub(b.weight(8, name="shift"), embedded(b)))
    after = PagedKv().run(b.graph({"logits": logits}), PassContext())
    (gather,) = [n for n in after.nodes if n.op.name == "gather_rows"]
    assert gather.inputs[0].op.name == "embedding"
    verify(after)


def test_places_that_are_shared_are_numbered() -> None:
    b = Model()
    table = b.param("table", F32, (11, 8))
    x = b.embedding(b.token_ids, table, dtype=F32)
    for _ in range(2):
        x = b(Attention(2, 2, 4, 0.5), x, x, x, b.positions)
    graph = PagedKv().run(b.graph({"logits": b.linear(x, table)}), PassContext())
    names = [getattr(v.op, "label", None) for v in graph.states]
    assert names == ["attention.key", "attention.value", "attention_2.key", "attention_2.value"]


def embedded(b: Model) -> Value:
    result: Value = b.embedding(b.token_ids, b.param("table", F32, (11, 8)), dtype=F32)
    return result


def average(b: Model) -> Value:
    x = embedded(b)
    return b.add(x, b.transpose(b.mean(b.transpose(x, axes=(1, 0))), axes=(1, 0)))  # type: ignore[no-any-return]


def unmasked(b: Model) -> Value:
    x = embedded(b)
    return b.matmul(b.softmax(b.matmul(x, b.transpose(x, axes=(1, 0)))), x)  # type: ignore[no-any-return]


def merged(b: Model) -> Value:
    wide = b.reshape(embedded(b), shape=(2 * b.tokens, 4))
    return b.reshape(b.exp(wide), shape=(b.tokens, 8))  # type: ignore[no-any-return]


def paired(b: Model) -> Value:
    column, row = (b.cast(b.reshape(b.positions, shape=s), dtype=F32) for s in ((b.tokens, 1), (1, b.tokens)))
    return b.add(embedded(b), b.mean(b.sub(column, row)))  # type: ignore[no-any-return]


def experts_of_a_parameter(b: Model) -> Value:
    weights = b.slice(embedded(b), axis=1, start=0, stop=3)
    shapes = ((DType.U8, (24, 32)), (DType.F16, (24, 1)), (DType.U8, (96, 32)), (DType.F16, (96, 1)))
    codes = [b.param(f"codes.{i}", dtype, shape) for i, (dtype, shape) in enumerate(shapes)]
    x = b.param("x", F32, (b.tokens, 32))
    return b(QuantizedExperts("q4", "silu"), x, weights, *codes)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (average, r"mean\(.*mixes tokens: it reduces f32\[8, tokens\] over the tokens"),
        (unmasked, r"matmul\(.*mixes tokens: it pairs each token with every other\. Only attention .*explain fuse-att"),
        (merged, r"reshape\(.*it hides the tokens of f32\[tokens, 8\] in f32\[2\*tokens, 4\]"),
        (paired, r"sub\(.*mixes tokens: its operands .* pair each token with every other"),
        (experts_of_a_parameter, r"quantized_experts\(.*mixes tokens: its activations and weights are not rows of tok"),
    ],
    ids=["average", "unmasked", "merged", "paired", "experts"],
)
def test_what_mixes_tokens_is_an_error(make: Callable[[Model], Value], message: str) -> None:
    b = Model()
    graph = b.graph({"logits": make(b)})
    with pytest.raises(LlmcError, match=message):
        PagedKv().run(graph, PassContext())


def test_what_keeps_tokens_apart_is_none() -> None:
    """Reshapes, transposes, slices and sums inside a token's own row are allowed."""
    b = Model()
    heads = b.transpose(b.reshape(embedded(b), shape=(b.tokens, 2, 4)), axes=(1, 0, 2))
    gram = b.matmul(b.reshape(heads, shape=(2, b.tokens, 1, 4)), b.reshape(heads, shape=(2, b.tokens, 4, 1)))
    flat = b.reshape(b.transpose(gram, axes=(1, 0, 2, 3)), shape=(b.tokens, 2))
    logits = b.concat(b.softmax(flat), b.slice(flat, axis=1, start=0, stop=1), axis=1)
    after = PagedKv().run(b.graph({"logits": logits}), PassContext())
    assert after.outputs[0][1].type == TensorType(F32, (symbol("outputs"), 3))


def test_other_interfaces_are_refused() -> None:
    b = Model()
    graph = b.graph({"scores": embedded(b)})
    with pytest.raises(LlmcError, match=r"from token_ids and positions to logits .* outputs \['scores'\]"):
        PagedKv().run(graph, PassContext())
    b = Model()
    b.input("mask", DType.I32, (b.tokens,))
    with pytest.raises(LlmcError, match=r"given inputs .*'mask'"):
        PagedKv().run(b.graph({"logits": embedded(b)}), PassContext())


def test_positions_must_be_the_input() -> None:
    b = Model()
    x = embedded(b)
    attended = b(Attention(2, 2, 4, 0.5), x, x, x, b.add(b.positions, b.positions))
    with pytest.raises(LlmcError, match="has positions of its own"):
        PagedKv().run(b.graph({"logits": attended}), PassContext())
