"""Launches that every task runs for itself: which they are, and that no live value is overwritten without barriers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.backends.base import KernelSpec, Launch
from llmc.backends.tvm import each
from llmc.backends.tvm.each import EACH_ELEMENTS, EACH_KINDS, each_tokens, place
from llmc.backends.tvm.lower import lower
from llmc.backends.tvm.lower_attention import entry_graph
from llmc.backends.tvm.plan import plan_entry
from llmc.entries import specialised
from llmc.ir.graph import Graph, StateInput
from llmc.ir.op import Hole, Node, Value
from llmc.ir.types import DType
from llmc.options import Limits
from llmc.passes.pipelines import step_pipeline
from llmc.passes.plan_memory import ALIGNMENT, MemoryPlan, largest_bytes, storage
from tests.passes.graphs import learned_model, rotary_model

TASKS = 3


def launch(each: bool, *values: Value) -> Launch:
    return Launch(KernelSpec.of("kernel"), values, "node", (0, 0, 0), (0, 0, 0), each)


def values(count: int) -> list[Value]:
    return [Value(Node(Hole(i), (), ())) for i in range(count)]


@st.composite
def launch_lists(draw: st.DrawFn) -> tuple[list[Launch], dict[Value, int]]:
    """Launches that read some values before them and write one or two, and the values' sizes."""
    launches: list[Launch] = []
    sizes: dict[Value, int] = {}
    for i in range(draw(st.integers(1, 14))):
        known = list(sizes)
        read = [known[-1 - back] for back in draw(st.sets(st.integers(0, 4), max_size=3)) if back < len(known)]
        made = [Value(Node(Hole(2 * i + j), (), ())) for j in range(draw(st.integers(1, 2)))]
        sizes |= {v: draw(st.integers(1, 3)) * ALIGNMENT for v in made}
        launches.append(launch(draw(st.booleans()), *read, *made))
    return launches, sizes


def run(
    launches: list[Launch],
    plans: tuple[MemoryPlan, MemoryPlan],
    sizes: dict[Value, int],
    choose: Callable[[list[int]], int],
) -> None:
    """Each task in turn reads, writes, reads again, and at a barrier waits; `choose` says whose turn it is.

    Raises `AssertionError` when a task does not find the value that it reads.
    """
    shared, private = plans
    arena: dict[int, Value] = {}
    regions: list[dict[int, Value]] = [{} for _ in range(TASKS)]
    writer = {v: i for i, item in reversed(list(enumerate(launches))) for v in item.arguments}

    def cells(value: Value, task: int) -> tuple[dict[int, Value], range]:
        memory, plan = (regions[task], private) if value in private.offsets else (arena, shared)
        start = plan.offsets[value] // ALIGNMENT
        return memory, range(start, start + sizes[value] // ALIGNMENT)

    def act(task: int, at: int, phase: int) -> None:
        for value in launches[at].arguments:
            memory, places = cells(value, task)
            if phase == 1 and writer[value] == at:
                memory.update(dict.fromkeys(places, value))
            elif phase != 1 and writer[value] < at:
                assert all(memory.get(place) == value for place in places), f"launch {at} of task {task}"

    places = [(0, 0)] * TASKS
    waiting: set[int] = set()
    while ready := [t for t in range(TASKS) if t not in waiting and places[t][0] < len(launches)]:
        task = choose(ready)
        at, phase = places[task]
        act(task, at, phase)
        places[task] = (at, phase + 1) if phase < 2 else (at + 1, 0)
        if phase == 2 and not launches[at].each:
            waiting.add(task)
            if len(waiting) == TASKS:
                waiting.clear()


def check(launches: list[Launch], sizes: dict[Value, int], seed: int = 0) -> None:
    plans = place(launches, lambda value: True, sizes)
    for choose in (min, max, random.Random(seed).choice):
        run(launches, plans, sizes, choose)


@given(launch_lists(), st.integers(0, 1000))
def test_tasks_that_run_ahead_overwrite_nothing(drawn: tuple[list[Launch], dict[Value, int]], seed: int) -> None:
    check(*drawn, seed)


def test_a_shared_value_lives_until_the_barrier_after_its_last_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    a, p, q, b, c = values(5)
    sizes = dict.fromkeys((a, p, q, b, c), ALIGNMENT)
    launches = [launch(False, a), launch(True, a, p), launch(True, p, q), launch(False, q, b), launch(False, b, c)]
    shared, private = place(launches, lambda value: True, sizes)
    assert set(private.offsets) == {p, q} and private.peak == 2 * ALIGNMENT
    assert shared.offsets[a] == shared.offsets[c] != shared.offsets[b]
    check(launches, sizes)
    monkeypatch.setattr(each, "_next_barriers", lambda launches: list(range(len(launches))))
    with pytest.raises(AssertionError, match="launch 1 of task"):
        check(launches, sizes)


LONGEST = 64


def entries(model: Graph) -> dict[str, Graph]:
    lowered = lower(step_pipeline(DType.F16).run(model), LONGEST)
    return {name: entry_graph(name, g, LONGEST) for name, g in specialised(lowered, Limits())}


@pytest.mark.parametrize("model", [rotary_model, learned_model])
def test_launches_of_models(model: Callable[..., Graph]) -> None:
    """Norms, tables and look-ups are for each task; nothing that they name is a state or an output."""
    for name, graph in entries(model(layers=2)).items():
        entry = plan_entry(name, graph)
        outputs = {storage(value) for _, value in graph.outputs}
        whole = [item for item in entry.launches if item.each]
        assert {item.spec.kind for item in whole} == {item.spec.kind for item in entry.launches} & EACH_KINDS
        assert len(whole) >= 2 * 2 + 1, "two norms a layer and an embedding"
        widest = max(v.type.concrete({"tokens": 1, "outputs": 1})[-1] for v in entry.private.offsets)
        assert each_tokens(entry.private) == EACH_ELEMENTS // widest
        for item in whole:
            roots = {storage(value) for value in item.arguments}
            assert not outputs & roots and not any(isinstance(root.op, StateInput) for root in roots)
        sizes = {v: -(-largest_bytes(v.type) // 64) * 64 for v in (*entry.memory.offsets, *entry.private.offsets)}
        assert len(sizes) == len(entry.memory.offsets) + len(entry.private.offsets), "a value has one place"
        stored = [
            launch(item.each, *(root for root in dict.fromkeys(map(storage, item.arguments)) if root in sizes))
            for item in entry.launches
        ]
        for choose in (min, max):
            run(stored, (entry.memory, entry.private), sizes, choose)


def test_rows_that_are_too_wide_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = entries(rotary_model(heads=4, width=4))["decode"]
    for elements, kinds in ((15, {"rotary_table"}), (16, EACH_KINDS)):
        monkeypatch.setattr(each, "EACH_ELEMENTS", elements)
        entry = plan_entry("decode", graph)
        found = {item.spec.kind for item in entry.launches if item.each}
        assert found == {item.spec.kind for item in entry.launches} & kinds
        assert each_tokens(entry.private) == elements // (2 if elements == 15 else 16)


def test_what_writes_an_output_is_shared() -> None:
    graph = entries(learned_model(layers=1))["decode"]
    added, normed = next(n for n in graph.nodes if n.op.name == "add_layer_norm").results
    shown = replace(graph, outputs=(*graph.outputs, ("normed", normed)))
    for case, whole in ((graph, True), (shown, False)):
        entry = plan_entry("decode", case)
        (found,) = (item for item in entry.launches if item.arguments[-2:] == (added, normed))
        assert (found.spec.kind, found.each) == ("add_layer_norm", whole)
        assert added in (entry.private if whole else entry.memory).offsets
        assert (normed in entry.private.offsets, normed in entry.memory.offsets) == (whole, False)
