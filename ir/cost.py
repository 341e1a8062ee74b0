"""What a graph costs at given sizes: operations and bytes, node by node and in sum."""

from __future__ import annotations

from collections.abc import Mapping

from llmc.ir.graph import Graph, substitute_attributes
from llmc.ir.op import Cost, Node


def node_cost(node: Node, sizes: Mapping[str, int]) -> Cost:
    """One node's cost with every symbol bound."""
    op = substitute_attributes(node.op, sizes)
    return op.cost(*(v.type.substitute(sizes) for v in node.inputs))


def graph_cost(graph: Graph, sizes: Mapping[str, int]) -> Cost:
    """Sum over the nodes that run at every step (the pack program runs once, at compile).

    A node that works only on views moves nothing; its bytes are those of its boundary all the same, which is what a
    backend without views would move.
    """
    total = Cost(0, 0, 0)
    for node in graph.nodes:
        if node not in graph.parameter_only:
            total += node_cost(node, sizes)
    return total
