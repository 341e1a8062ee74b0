"""Rotary tables whose frequencies depend on the position, which one kernel makes from the positions."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Op, Value
from llmc.ir.ops.rope import DynamicFrequencies, RotaryTable
from llmc.ir.types import DType


@dataclass(frozen=True)
class DynamicRotaryTable(Op):
    """`rotary_table` over `dynamic_frequencies`, in one. Operand: positions i32 [t]; results: cos, sin f32
    [t, rotary_dim / 2]."""

    base: float
    factor: float
    max_positions: int
    rotary_dim: int
    scaling: float

    stage = "step"
    result_count = 2

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        (positions,) = values
        frequencies = b.dynamic_frequencies(
            b.cast(positions, dtype=DType.F32),
            base=self.base,
            factor=self.factor,
            max_positions=self.max_positions,
            rotary_dim=self.rotary_dim,
        )
        result: tuple[Value, ...] = b.rotary_table(positions, frequencies, scaling=self.scaling)
        return result


def dynamic_table(b: Emitter, op: RotaryTable, source: DynamicFrequencies, positions: Value) -> tuple[Value, ...]:
    """Cosines and sines of positions i32, in one op."""
    table = DynamicRotaryTable(source.base, source.factor, source.max_positions, source.rotary_dim, op.scaling)
    return b.make(table, (positions,)).results


def absorbed(graph: Graph) -> set[Node]:
    """Nodes that exist only to feed a dynamic rotary table, which computes them itself."""
    found: set[Node] = set()
    for node in graph.nodes:
        if isinstance(node.op, DynamicFrequencies):
            found.add(node)
            (positions,) = node.inputs
            if all(n in found for n, _ in graph.uses[positions]):
                found.add(positions.node)
    return found
