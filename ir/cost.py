"""What a graph costs at given sizes: operations and bytes, node by node and in sum."""

from __future__ import annotations

from collections.abc import Mapping

from llmc.ir.graph import Graph, substitute_attributes
from llmc.ir.op import Cost, Node
from llmc.ir.ops.linear import GatedLinear, Linear
from llmc.ir.ops.quantized import DequantizeWeight


def node_cost(node: Node, sizes: Mapping[str, int]) -> Cost:
    """One node's cost with every symbol bound. A product with a weight that is dequantized reads its codes, at their
    true bits: the kernel for the two is one."""
    op = substitute_attributes(node.op, sizes)
    cost = op.cost(*(v.type.substitute(sizes) for v in node.inputs))
    if isinstance(op, Linear | GatedLinear) and isinstance(node.inputs[1].op, DequantizeWeight):
        weight = node.inputs[1]
        stored = weight.op.bytes_read([v.type for v in weight.node.inputs])
        return Cost(cost.flops, cost.bytes_read - weight.type.bytes + stored, cost.bytes_written)
    return cost


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
