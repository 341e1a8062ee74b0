"""From a lowered, specialised graph to launches and buffers."""

from __future__ import annotations

from typing import Any

from llmc.backends.base import Entry, Launch
from llmc.backends.buffers import Buffers, bounds_of, is_intermediate, is_view, linear_cost, window_of
from llmc.backends.tvm.each import place, runs_whole
from llmc.backends.tvm.select import select
from llmc.ir.graph import Graph
from llmc.ir.op import Node


def plan_entry(name: str, graph: Graph) -> Entry:
    """Launches in the graph's order; values that only pass between launches share memory by their lifetimes."""
    launches = [_launch(n, graph) for n in graph.nodes if n not in graph.parameter_only and not is_view(n)]
    bounds = {n: bounds_of(graph, n) for n in ("tokens", "sequences", "outputs")}
    return Entry(name, bounds, graph, launches, *place(launches, lambda value: is_intermediate(value, graph)))


def describe_entry(entry: Entry, buffers: Buffers) -> dict[str, Any]:
    """The entry as plan.json has it."""
    return {
        **{name: list(bound) for name, bound in entry.bounds.items()},
        "launches": [
            {
                "kernel": buffers.kernel(launch.spec.symbol),
                "args": [buffers.index(value, entry) for value in launch.arguments],
                "barrier": True,
                "each": launch.each,
                "node": launch.node,
                "flops": list(launch.flops),
                "bytes": list(launch.bytes),
                "window": launch.window,
            }
            for launch in entry.launches
        ],
    }


def _launch(node: Node, graph: Graph) -> Launch:
    chosen = select(node)
    assert chosen is not None, f"{node!r} was lowered to an op without a kernel"
    flops, traffic = linear_cost(node, "flops"), linear_cost(node, "bytes")
    where = f"{node.loc}:{node.op.name}" if node.loc else node.op.name
    each = runs_whole(chosen, node.results, lambda value: is_intermediate(value, graph))
    return Launch(chosen.spec, chosen.arguments, where, flops, traffic, each, window=window_of(node))
