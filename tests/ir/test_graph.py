"""Graphs: order, readers, the pack program, rebuilding, substitution, costs."""

from __future__ import annotations

import networkx as nx
import pytest

from llmc.ir.builder import Builder
from llmc.ir.cost import graph_cost, node_cost
from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph, prune
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.printer import layer_index
from llmc.ir.types import DType, symbol
from llmc.ir.verify import verify
from llmc.passes.pipelines import step_pipeline
from tests.passes.graphs import learned_model, rotary_model

F32 = DType.F32


def test_operands_stand_before_their_readers_and_nothing_is_dead() -> None:
    for graph in (rotary_model(layers=3), learned_model()):
        seen: set[Node] = set()
        for node in graph.nodes:
            assert all(v.node in seen or v.op.leaf for v in node.inputs)
            seen.add(node)
        indices = [layer_index(n.loc) for n in graph.nodes]
        inside = [i for i in indices if i is not None]
        assert inside == sorted(inside)


def test_readers() -> None:
    b = Builder("g")
    x = b.input("x", F32, (2,))
    y = b.exp(x)
    b.neg(x)  # nobody reads this: it is not in the graph
    graph = b.graph({"z": b.add(y, y)})
    assert [(n.op.name, i) for n, i in graph.uses[y]] == [("add", 0), ("add", 1)]
    assert [n.op.name for n, _ in graph.uses[x]] == ["exp"]
    assert graph.results == {graph.outputs[0][1]}
    assert graph.leaf("x") == x
    with pytest.raises(LlmcError, match="graph g has no input, parameter or state 'y'; known: x"):
        graph.leaf("y")


def test_the_pack_program() -> None:
    b = Builder("g")
    x, w = b.input("x", F32, (2, 3)), b.param("w", DType.BF16, (4, 3))
    wide = b.transpose(b.cast(w, dtype=F32), axes=(1, 0))
    graph = b.graph({"y": b.add(b.matmul(x, wide), b.constant([1.0] * 4, F32))})
    assert sorted(n.op.name for n in graph.parameter_only) == ["cast", "constant", "transpose"]
    assert [c.array.tolist() for c in graph.constants.values()] == [[1.0] * 4]


def test_rebuilding() -> None:
    graph = rotary_model()
    assert graph.map() == graph

    def emit(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        b = Emitter()
        b.loc = node.loc
        return (b.neg(b.neg(b.exp(*inputs))),) if node.op.name == "sigmoid" else b.make(node.op, inputs).results

    changed = graph.map(emit)
    verify(changed)
    assert [n.op.name for n in changed.nodes].count("neg") == 4
    assert "sigmoid" not in str(changed)


def test_pruning() -> None:
    b = Builder("g")
    x, y = b.input("x", F32, (2,)), b.input("y", F32, (2,))
    b.param("w", F32, (2,))
    graph = b.graph({"out": b.exp(x)})
    assert (prune(graph).inputs, prune(graph).params) == ((x,), ())
    assert prune(graph, ["y"]).inputs == (x, y)
    returned = b.graph({"out": y})
    assert prune(returned).inputs == (y,)


def test_substitution() -> None:
    step = step_pipeline(DType.F16).run(rotary_model())
    sizes = {"tokens": 3, "sequences": 2, "outputs": 1, "max_blocks": 4, "num_blocks": 9}
    fixed = step.substitute(sizes)
    verify(fixed)
    assert fixed.symbols == {}
    assert str(fixed.leaf("query_start").type) == "i32[3]"
    assert str(fixed.leaf("layers.0.attention.key").type) == "f16[9, 2, 4, 16]"
    assert step.substitute({}) == step
    renamed = rotary_model().substitute({"tokens": symbol("t", 2, 4)})
    verify(renamed)
    assert list(renamed.symbols) == ["t"]


def test_a_symbol_has_one_set_of_bounds() -> None:
    b = Builder("g")
    x, y = b.input("x", F32, (symbol("t", 1, 4),)), b.input("y", F32, (symbol("t", 1, 5),))
    with pytest.raises(LlmcError, match="symbol t has two sets of bounds"):
        _ = b.graph({"a": b.exp(x), "b": b.exp(y)}).symbols


def test_networkx() -> None:
    graph = rotary_model()
    edges = graph.to_networkx()
    assert nx.is_directed_acyclic_graph(edges)
    assert set(edges) == set(graph.nodes)
    last = graph.outputs[0][1].node
    assert {last, *nx.ancestors(edges, last)} == set(graph.nodes)


def test_costs_are_sums_at_sizes() -> None:
    graph = rotary_model(layers=2)
    one, two = graph_cost(graph, {"tokens": 4}), graph_cost(rotary_model(layers=4), {"tokens": 4})
    none = graph_cost(rotary_model(layers=0), {"tokens": 4})
    per_layer = (one.flops - none.flops) / 2
    assert two.flops - none.flops == pytest.approx(4 * per_layer, rel=0.05)  # the rotary table is there once
    matmul = next(n for n in graph.nodes if n.op.name == "matmul")
    assert node_cost(matmul, {"tokens": 4}).flops == 2 * 4 * 16 * 16
    packed = [n for n in graph.nodes if n in graph.parameter_only]
    assert packed
    assert one.bytes == sum(node_cost(n, {"tokens": 4}).bytes for n in graph.nodes if n not in graph.parameter_only)


def test_deep_graphs_do_not_recurse() -> None:
    b = Builder("g")
    x = b.input("x", F32, (1,))
    for _ in range(5000):
        x = b.exp(x)
    graph = b.graph({"out": x})
    assert len(graph.nodes) == 5000
    assert graph.map() == graph
    assert isinstance(graph, Graph)
