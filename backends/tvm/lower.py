"""From a step graph to ops that have CPU kernels: weights packed in panels, norm weights in float32.

What is added on the parameters' side is the pack program: it runs once, tensor by tensor, when the package is written.
"""

from __future__ import annotations

from llmc.backends.tvm.lower_attention import lower_append, lower_attention
from llmc.backends.tvm.ops import DynamicRotaryTable, PackedEmbedding, PackedGatedLinear, PackedLinear
from llmc.backends.tvm.select import has_kernel
from llmc.ir.errors import NoKernel
from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Hole, Node, Value, as_tuple, topological
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.ops.cache import QkvAppend, RopeAppend
from llmc.ir.ops.embedding import Embedding
from llmc.ir.ops.linear import GatedLinear, Linear
from llmc.ir.ops.norm import AddLayerNorm, AddRmsNorm, LayerNorm, RmsNorm
from llmc.ir.ops.rope import DynamicFrequencies, RotaryTable
from llmc.ir.printer import op_text
from llmc.ir.types import DType

_NORM_PARAMETERS = {RmsNorm: 1, AddRmsNorm: 2, LayerNorm: 1, AddLayerNorm: 2}
"""Where a norm's weights begin among its operands."""


def lower(graph: Graph, longest: int) -> Graph:
    """The graph with every node in an op that has a kernel. Raises `NoKernel` naming the first that has none.

    A sequence has `longest` tokens at most.
    """
    lowering = _Lowering(graph, longest)
    return graph.map(lowering.node)


class _Lowering:
    def __init__(self, graph: Graph, longest: int) -> None:
        self.longest = longest
        self.packed: dict[tuple[str, Value], Value] = {}
        self.parameter_only = graph.parameter_only
        linear = {n.inputs[1] for n in graph.nodes if isinstance(n.op, Linear)}
        self.absorbed = _absorbed(graph)
        self.tied = {n.inputs[1] for n in graph.nodes if isinstance(n.op, Embedding)} & linear

    def node(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """What takes the node's place; `inputs` are its operands, lowered already."""
        b = Emitter()
        b.loc = node.loc
        if node in self.absorbed:
            return node.results
        if node in self.parameter_only:
            return b.make(node.op, inputs).results if inputs != node.inputs else node.results
        return as_tuple(self.lowered(b, node, inputs))

    def lowered(self, b: Emitter, node: Node, inputs: tuple[Value, ...]) -> Value | tuple[Value, ...]:
        """The node in ops that have kernels."""
        op = node.op
        if isinstance(op, Linear):
            panels = self._pack(b, "pack_panels", inputs[1])
            rows = node.types[0].shape[1]
            assert isinstance(rows, int)
            return self._emit(b, PackedLinear(rows, op.bias, op.activation), inputs[0], panels, *_floats(b, inputs[2:]))
        if isinstance(op, GatedLinear):
            return self._gated(b, op, node, inputs)
        if isinstance(op, Embedding) and node.inputs[1] in self.tied:
            panels = self._pack(b, "pack_panels", inputs[1])
            rows = inputs[1].type.shape[0]
            assert isinstance(rows, int)
            return self._emit(b, PackedEmbedding(rows), inputs[0], panels)
        if isinstance(op, RopeAppend | QkvAppend):
            return lower_append(b, op, inputs)
        if isinstance(op, PagedAttention):
            attention = lower_attention(b, op, inputs, self.longest)
            if attention is not None:
                return attention
        if isinstance(op, RotaryTable) and isinstance(inputs[1].op, DynamicFrequencies):
            source = inputs[1].op
            table = DynamicRotaryTable(source.base, source.factor, source.max_positions, source.rotary_dim, op.scaling)
            return b.make(table, inputs[:1]).results
        if type(op) in _NORM_PARAMETERS:
            first = _NORM_PARAMETERS[type(op)]
            inputs = (*inputs[:first], *_floats(b, inputs[first:]))
        made = b.make(op, inputs)
        if has_kernel(made):
            return made.results
        if not op.decomposes:
            name, attributes = op_text(op)
            types = ", ".join(str(v.type) for v in inputs)
            raise NoKernel(f"no CPU kernel for {name}({types}){attributes} at {node.loc or 'no place'}, a primitive op")
        return self._expand(b, made)

    def _expand(self, b: Emitter, node: Node) -> tuple[Value, ...]:
        """The node's decomposition, lowered in turn."""
        holes, results = node.op.expand([v.type for v in node.inputs])
        new = dict(zip(holes, node.inputs, strict=True))
        for inner in topological(v.node for v in results):
            if isinstance(inner.op, Hole):
                continue
            made = self.lowered(b, inner, tuple(new[v] for v in inner.inputs))
            new.update(zip(inner.results, as_tuple(made), strict=True))
        return tuple(new[v] for v in results)

    def _emit(self, b: Emitter, op: PackedLinear | PackedGatedLinear | PackedEmbedding, *inputs: Value) -> Value:
        made = b.make(op, inputs)
        assert has_kernel(made), made
        return made.results[0]

    def _gated(self, b: Emitter, op: GatedLinear, node: Node, inputs: tuple[Value, ...]) -> Value:
        rows = node.types[0].shape[1]
        assert isinstance(rows, int)
        if not op.bias:
            panels = self._pack(b, "pack_gated", inputs[1])
            return self._emit(b, PackedGatedLinear(rows, op.activation), inputs[0], panels)
        x, weight, bias = inputs
        halves = []
        for start, activation in ((0, op.activation), (rows, "none")):
            part = b.slice(weight, axis=0, start=start, stop=start + rows)
            part_bias = b.slice(bias, axis=0, start=start, stop=start + rows)
            panels = self._pack(b, "pack_panels", part)
            halves.append(self._emit(b, PackedLinear(rows, True, activation), x, panels, *_floats(b, (part_bias,))))
        result: Value = b.mul(*halves)
        return result

    def _pack(self, b: Emitter, how: str, weight: Value) -> Value:
        """The weight in panels, made once for all its readers."""
        key = (how, weight)
        if key not in self.packed:
            self.packed[key] = getattr(b, how)(weight)
        return self.packed[key]


def _absorbed(graph: Graph) -> set[Node]:
    """Nodes that exist only to feed a dynamic rotary table, which computes them itself."""
    found: set[Node] = set()
    for node in graph.nodes:
        if isinstance(node.op, DynamicFrequencies):
            found.add(node)
            (positions,) = node.inputs
            if all(n in found for n, _ in graph.uses[positions]):
                found.add(positions.node)
    return found


def _floats(b: Emitter, values: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(v if v.type.dtype is DType.F32 else b.cast(v, dtype=DType.F32) for v in values)
