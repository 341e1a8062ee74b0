"""From a step graph to ops that have CPU kernels: weights packed in panels, norm weights in float32.

What is added on the parameters' side is the pack program: it runs once, tensor by tensor, when the package is written.
"""

from __future__ import annotations

from typing import Any

from llmc.backends.dynamic_rotary import absorbed, dynamic_table
from llmc.backends.lowering import Lowering
from llmc.backends.tvm.lower_attention import lower_append, lower_attention
from llmc.backends.tvm.ops import PackedEmbedding, PackedGatedLinear, PackedLinear
from llmc.backends.tvm.select import has_kernel
from llmc.backends.tvm.tile_fusions import TILE_FUSIONS
from llmc.backends.tvm.tiled_ops import BestOfPanels, TiledEmbedding, TiledGatedLinear, TiledLinear
from llmc.ir.errors import NoKernel
from llmc.ir.graph import Graph
from llmc.ir.op import Emitter, Node, Value, as_tuple
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.ops.cache import QkvAppend, RopeAppend
from llmc.ir.ops.embedding import Embedding
from llmc.ir.ops.linear import GatedLinear, Linear
from llmc.ir.ops.norm import AddLayerNorm, AddRmsNorm, LayerNorm, NormHeads, RmsNorm
from llmc.ir.ops.quantized import QuantizedEmbedding, QuantizedGatedLinear, QuantizedLinear
from llmc.ir.ops.reduce import Argmax
from llmc.ir.ops.rope import DynamicFrequencies, RotaryTable
from llmc.ir.ops.shape import Reshape
from llmc.ir.pattern import Match
from llmc.ir.quant import INTEGER_FORMATS
from llmc.ir.rewrite import Fuse, rewrite
from llmc.ir.types import DType

_NORM_PARAMETERS = {RmsNorm: 1, AddRmsNorm: 2, LayerNorm: 1, AddLayerNorm: 2, NormHeads: 1}
"""Where a norm's weights begin among its operands."""

_INTEGERS = ", ".join(INTEGER_FORMATS)


def lower(graph: Graph, longest: int) -> Graph:
    """The graph with every node in an op that has a kernel. Raises `NoKernel` naming the first that has none.

    A sequence has `longest` tokens at most.
    """
    lowering = _Lowering(graph, longest)
    return rewrite(graph.map(lowering.node), [_FuseIntoProducer(op) for op in TILE_FUSIONS]).graph


class _FuseIntoProducer(Fuse):
    """What follows becomes part of the launch that makes its operand, and stands where that stands."""

    def rewrite(self, b: Emitter, match: Match) -> Any:
        b.loc = match.root.inputs[0].node.loc
        return super().rewrite(b, match)


class _Lowering(Lowering):
    processor = "CPU"

    def __init__(self, graph: Graph, longest: int) -> None:
        self.longest = longest
        self.packed: dict[tuple[str, Value], Value] = {}
        self.tiles: dict[Value, tuple[Value, ...]] = {}
        self.parameter_only = graph.parameter_only
        linear = {n.inputs[1] for n in graph.nodes if isinstance(n.op, Linear)}
        self.absorbed = absorbed(graph)
        self.tied = {n.inputs[1] for n in graph.nodes if isinstance(n.op, Embedding)} & linear

    def has_kernel(self, node: Node) -> bool:
        return has_kernel(node)

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
            packed = PackedLinear(rows, op.bias, op.activation, op.residual)
            bias, residual = inputs[2 : 2 + op.bias], inputs[2 + op.bias :]
            return self.emit(b, packed, inputs[0], panels, *_floats(b, bias), *residual)
        if isinstance(op, GatedLinear):
            return self._gated(b, op, node, inputs)
        if isinstance(op, QuantizedLinear | QuantizedGatedLinear | QuantizedEmbedding):
            return self._quantized(b, op, inputs)
        if isinstance(op, Argmax) and isinstance(inputs[0].op, TiledLinear):
            # Its panels say which output is the largest, as they are made: logits are not read again.
            return self.emit(b, BestOfPanels(), b.panel_keys(inputs[0]))
        if isinstance(op, Embedding) and node.inputs[1] in self.tied:
            panels = self._pack(b, "pack_panels", inputs[1])
            rows = inputs[1].type.shape[0]
            assert isinstance(rows, int)
            return self.emit(b, PackedEmbedding(rows), inputs[0], panels)
        if isinstance(op, RopeAppend | QkvAppend):
            return lower_append(b, op, inputs)
        if isinstance(op, PagedAttention):
            attention = lower_attention(b, op, inputs, self.longest)
            if attention is not None:
                return attention
        if isinstance(op, RotaryTable) and isinstance(inputs[1].op, DynamicFrequencies):
            return dynamic_table(b, op, inputs[1].op, inputs[0])
        if isinstance(op, Reshape):  # the same memory
            return b.make(op, inputs).results
        if type(op) in _NORM_PARAMETERS:
            first = _NORM_PARAMETERS[type(op)]
            inputs = (*inputs[:first], *_floats(b, inputs[first:]))
        return self.kernel_or_parts(b, b.make(op, inputs))

    def _quantized(
        self, b: Emitter, op: QuantizedLinear | QuantizedGatedLinear | QuantizedEmbedding, inputs: tuple[Value, ...]
    ) -> Value:
        """The op over codes and scales in panels; activations in tiles, made once for all their readers."""
        x, codes, scales, *rest = inputs
        if not op.quant.integer_products:
            place = b.loc or "no place"
            raise NoKernel(f"no CPU kernel for {op.name} of weights in {op.format} at {place}; CPUs take {_INTEGERS}")
        bits = op.quant.bits
        rows, width = codes.type.shape[0], x.type.shape[-1]
        assert isinstance(rows, int)
        if isinstance(op, QuantizedGatedLinear):
            if op.bias:
                return self._gated_with_bias(b, op, inputs)
            codes, scales = b.interleave_gated(codes), b.interleave_gated(scales)
        weight = (b.pack_codes(codes, bits=bits), b.pack_panels(scales))
        if isinstance(op, QuantizedEmbedding):
            return self.emit(b, TiledEmbedding(op.format, rows, op.width), x, *weight)
        assert isinstance(width, int)
        if x not in self.tiles:
            self.tiles[x] = b.quantize_tiles(x)
        if isinstance(op, QuantizedGatedLinear):
            gated = TiledGatedLinear(op.format, rows // 2, width, op.activation)
            return self.emit(b, gated, *self.tiles[x], *weight)
        linear = TiledLinear(op.format, rows, width, op.bias, op.activation, op.residual)
        return self.emit(b, linear, *self.tiles[x], *weight, *_floats(b, tuple(rest)))

    def _gated_with_bias(self, b: Emitter, op: QuantizedGatedLinear, inputs: tuple[Value, ...]) -> Value:
        """Two linears and a product: gated panels have no place for a bias."""
        x, *weights = inputs
        rows = weights[0].type.shape[0]
        assert isinstance(rows, int)
        halves = []
        for start, activation in ((0, op.activation), (rows // 2, "none")):
            part = [b.slice(w, axis=0, start=start, stop=start + rows // 2) for w in weights]
            halves.append(self._quantized(b, QuantizedLinear(op.format, True, activation), (x, *part)))
        result: Value = b.mul(*halves)
        return result

    def _gated(self, b: Emitter, op: GatedLinear, node: Node, inputs: tuple[Value, ...]) -> Value:
        rows = node.types[0].shape[1]
        assert isinstance(rows, int)
        if not op.bias:
            panels = self._pack(b, "pack_gated", inputs[1])
            return self.emit(b, PackedGatedLinear(rows, op.activation), inputs[0], panels)
        x, weight, bias = inputs
        halves = []
        for start, activation in ((0, op.activation), (rows, "none")):
            part = b.slice(weight, axis=0, start=start, stop=start + rows)
            part_bias = b.slice(bias, axis=0, start=start, stop=start + rows)
            panels = self._pack(b, "pack_panels", part)
            halves.append(self.emit(b, PackedLinear(rows, True, activation), x, panels, *_floats(b, (part_bias,))))
        result: Value = b.mul(*halves)
        return result

    def _pack(self, b: Emitter, how: str, weight: Value) -> Value:
        """The weight in panels, made once for all its readers."""
        key = (how, weight)
        if key not in self.packed:
            self.packed[key] = getattr(b, how)(weight)
        return self.packed[key]


def _floats(b: Emitter, values: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(v if v.type.dtype is DType.F32 else b.cast(v, dtype=DType.F32) for v in values)
