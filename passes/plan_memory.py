"""Where the values of a step lie: one arena, in which values that are never alive together share memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmc.ir.graph import Graph
from llmc.ir.op import Value
from llmc.ir.ops.shape import Reshape
from llmc.ir.types import Dim, TensorType, substitute, upper_bound
from llmc.passes.base import Pass, PassContext

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets in bytes, multiples of `ALIGNMENT`, by value; the arena's size, and the sum without any sharing."""

    offsets: Mapping[Value, int]
    peak: int
    naive: int


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Plans the arena at the upper bounds of all symbols and reports `peak` and `naive` bytes; the graph stays."""

    name = "plan-memory"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        plan = plan_memory(graph)
        context.record.numbers |= {"peak": plan.peak, "naive": plan.naive, "values": len(plan.offsets)}
        return graph


def plan_memory(graph: Graph, sizes: Mapping[str, int] | None = None) -> MemoryPlan:
    """A place for every value that a step computes, in the graph's order of nodes.

    `sizes` gives symbols their largest values; those left out take their own bounds. Parameters, what depends on them
    alone, inputs, states and outputs lie elsewhere. A reshape is its operand seen otherwise, and needs no place.
    """
    computed = [n for n in graph.nodes if n not in graph.parameter_only]
    outputs = {storage(v) for _, v in graph.outputs}
    lifetimes: dict[Value, tuple[int, int]] = {}
    for i, node in enumerate(computed):
        for value in (*node.inputs, *node.results):
            root = storage(value)
            if root.op.leaf or root.node in graph.parameter_only or root in outputs:
                continue
            first, _ = lifetimes.get(root, (i, i))
            lifetimes[root] = (first, i)
    return allocate(lifetimes, {v: largest_bytes(v.type, sizes) for v in lifetimes})


def allocate(lifetimes: Mapping[Value, tuple[int, int]], sizes: Mapping[Value, int]) -> MemoryPlan:
    """Greedy by size: each value, the largest first, at the lowest offset that is free while it lives.

    A lifetime is (first, last) step, both included: what a step writes never lies over what it reads.
    """
    order = sorted(lifetimes, key=lambda v: (-sizes[v], lifetimes[v]))
    offsets: dict[Value, int] = {}
    for value in order:
        first, last = lifetimes[value]
        taken = sorted(
            (offsets[other], offsets[other] + _aligned(sizes[other]))
            for other in offsets
            if lifetimes[other][0] <= last and first <= lifetimes[other][1]
        )
        offset = 0
        for start, stop in taken:
            if offset + _aligned(sizes[value]) <= start:
                break
            offset = max(offset, stop)
        offsets[value] = offset
    peak = max((offsets[v] + _aligned(sizes[v]) for v in offsets), default=0)
    return MemoryPlan({v: offsets[v] for v in lifetimes}, peak, sum(_aligned(sizes[v]) for v in offsets))


def storage(value: Value) -> Value:
    """The value whose memory this one is: reshapes and updated states are their operand's."""
    while True:
        node = value.node
        if isinstance(node.op, Reshape):
            value = node.inputs[0]
            continue
        operands = [operand for operand, result in node.op.updates.items() if result == value.index]
        if not operands:
            return value
        value = node.inputs[operands[0]]


def largest_bytes(type: TensorType, sizes: Mapping[str, int] | None = None) -> int:
    """Bytes of a value at the given sizes, or the symbols' upper bounds."""
    given: dict[str, Dim] = dict(sizes or {})
    elements = 1
    for dim in type.shape:
        elements *= upper_bound(substitute(dim, given))
    return elements * type.dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
