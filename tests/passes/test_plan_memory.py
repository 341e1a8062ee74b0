"""Memory plans: no two values that live together overlap, everything is aligned, and sharing saves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmc.ir.op import Hole, Node, Value
from llmc.ir.types import DType
from llmc.passes.base import PassContext
from llmc.passes.pipelines import entry_pipeline, step_pipeline
from llmc.passes.plan_memory import ALIGNMENT, MemoryPlan, allocate, largest_bytes, plan_memory, storage
from tests.passes.graphs import Model, learned_model, rotary_model

LIFETIMES = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(1, 1000)).map(lambda t: (t[0], t[0] + t[1], t[2])),
    max_size=24,
)


def check_plan(plan: MemoryPlan, lifetimes: dict[Value, tuple[int, int]], sizes: dict[Value, int]) -> None:
    assert plan.offsets.keys() == lifetimes.keys()
    values = list(lifetimes)
    for i, a in enumerate(values):
        assert plan.offsets[a] % ALIGNMENT == 0
        assert 0 <= plan.offsets[a] <= plan.peak - sizes[a]
        for b in values[:i]:
            together = lifetimes[a][0] <= lifetimes[b][1] and lifetimes[b][0] <= lifetimes[a][1]
            apart = plan.offsets[a] + sizes[a] <= plan.offsets[b] or plan.offsets[b] + sizes[b] <= plan.offsets[a]
            assert apart or not together
    assert plan.peak <= plan.naive


@given(LIFETIMES)
def test_no_two_live_values_overlap(drawn: list[tuple[int, int, int]]) -> None:
    values = [Value(Node(Hole(i), (), ())) for i in range(len(drawn))]
    lifetimes = {v: (first, last) for v, (first, last, _) in zip(values, drawn, strict=True)}
    sizes = {v: size for v, (_, _, size) in zip(values, drawn, strict=True)}
    plan = allocate(lifetimes, sizes)
    check_plan(plan, lifetimes, sizes)
    busiest = max(
        (sum(-(-sizes[v] // 64) * 64 for v, (a, b) in lifetimes.items() if a <= t <= b) for t in range(20)), default=0
    )
    assert plan.peak >= busiest
    assert allocate(lifetimes, sizes).offsets == plan.offsets


def test_values_that_never_meet_share() -> None:
    a, b, c = (Value(Node(Hole(i), (), ())) for i in range(3))
    plan = allocate({a: (0, 1), b: (1, 2), c: (2, 3)}, {a: 100, b: 100, c: 100})
    assert plan.offsets[a] == plan.offsets[c] != plan.offsets[b]
    assert (plan.peak, plan.naive) == (256, 384)


def test_graphs() -> None:
    for model in (rotary_model(layers=4), learned_model(layers=4)):
        graph = entry_pipeline("prefill", tokens=32, sequences=4).run(step_pipeline(DType.F16).run(model))
        plan = plan_memory(graph)
        nodes = [n for n in graph.nodes if n not in graph.parameter_only]
        outputs = {v for _, v in graph.outputs}
        lifetimes: dict[Value, tuple[int, int]] = {}
        for i, node in enumerate(nodes):
            for value in (*node.inputs, *node.results):
                if value in plan.offsets:
                    lifetimes[value] = (lifetimes.get(value, (i, i))[0], i)
        check_plan(plan, lifetimes, {v: largest_bytes(v.type) for v in lifetimes})
        assert not outputs & plan.offsets.keys()
        assert not any(v.op.leaf or v.node in graph.parameter_only for v in plan.offsets)
        assert not any(storage(v) != v for v in plan.offsets)
        assert plan.peak * 4 < plan.naive


def test_more_layers_take_no_more_memory() -> None:
    peaks = set()
    for layers in (2, 6):
        context = PassContext()
        step = step_pipeline(DType.F16).run(rotary_model(layers=layers))
        entry_pipeline("decode").run(step, context)
        peaks.add(context.record.numbers["peak"])
    assert len(peaks) == 1


def test_sizes_may_be_given() -> None:
    graph = step_pipeline(DType.F16).run(rotary_model())
    small = plan_memory(graph, {"tokens": 1, "outputs": 1})
    large = plan_memory(graph, {"tokens": 64, "outputs": 64})
    assert small.peak < large.peak


def test_a_reshape_keeps_its_operand_alive() -> None:
    b = Model()
    x = b.input("x", DType.F32, (4, 4))
    y = b.exp(x)
    view = b.reshape(y, shape=(2, 8))
    z = b.tanh(b.sin(b.cos(x)))
    graph = b.graph({"out": b.concat(view, b.reshape(z, shape=(2, 8)), axis=0)})
    plan = plan_memory(graph)
    assert view not in plan.offsets
    assert plan.offsets[y] not in {o for v, o in plan.offsets.items() if v != y}
