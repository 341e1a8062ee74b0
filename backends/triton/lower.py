"""From a step graph to ops that have Triton kernels: weights in blocks, and activations that enter products rounded to
the dtype of the matrix units. What a product's result is added to stays in f32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmc.backends.dynamic_rotary import absorbed, dynamic_table
from llmc.backends.lowering import Lowering
from llmc.backends.triton.blocks import block_weight, packed_codes
from llmc.backends.triton.fuse import fuse_ends
from llmc.backends.triton.ops import (
    SAMPLING_WORDS,
    BlockAppend,
    BlockEmbedding,
    BlockGatedLinear,
    BlockLinear,
    RoundedAppend,
    RoundedNorm,
    SelectTokens,
    narrow,
    takes_norm,
    wide,
)
from llmc.backends.triton.packing_ops import OrderRows
from llmc.backends.triton.select import has_kernel
from llmc.ir.errors import NoKernel
from llmc.ir.graph import Graph, Input
from llmc.ir.op import Emitter, Node, Value, as_tuple
from llmc.ir.ops.attention import PagedAttention
from llmc.ir.ops.cache import QkvAppend, RopeAppend
from llmc.ir.ops.embedding import Embedding
from llmc.ir.ops.grouped import GroupedLinear
from llmc.ir.ops.linear import GatedLinear, Linear
from llmc.ir.ops.norm import LayerNorm, NormHeads, RmsNorm
from llmc.ir.ops.quantized import DequantizeWeight, QuantizedEmbedding
from llmc.ir.ops.reduce import Argmax
from llmc.ir.ops.rope import DynamicFrequencies, RotaryTable
from llmc.ir.ops.shape import Reshape
from llmc.ir.types import DType, TensorType

_PRODUCTS = (Linear, GatedLinear)


def lower(graph: Graph, compute: DType) -> Graph:
    """The graph with every node in an op that has a kernel. Raises `NoKernel` naming the first that has none."""
    lowering = _Lowering(graph, compute)
    lowered = graph.map(lowering.node)
    inputs = (*lowered.inputs, *([lowering.sampling] if lowering.sampling else []))
    outputs = (*lowered.outputs, *([("chosen", lowering.chosen)] if lowering.chosen else []))
    return fuse_ends(lowered.map(inputs=inputs, outputs=outputs))


def entry_graph(name: str, graph: Graph) -> Graph:
    """A lowered, specialised graph in the form that its entry point runs.

    With one token for each sequence, norms become part of the products that read them: a launch less, where a launch
    takes as long as reading half a megabyte. With many, each tile of a product would normalise its rows again.
    """
    return graph.map(_norm_into_product) if name == "decode" else graph


def _norm_into_product(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
    b = Emitter()
    b.loc = node.loc
    norm = inputs[0].op if inputs else None
    product = isinstance(node.op, BlockLinear | BlockGatedLinear | BlockAppend)
    if product and isinstance(norm, RoundedNorm) and not norm.centred and not norm.residual:
        assert isinstance(node.op, BlockLinear | BlockGatedLinear | BlockAppend)
        fused = replace(node.op, norm_eps=norm.eps)
        return b.make(fused, (*inputs[0].node.inputs, *inputs[1:])).results
    return node.results if inputs == node.inputs else b.make(node.op, inputs).results


class _Lowering(Lowering):
    processor = "GPU"

    def __init__(self, graph: Graph, compute: DType) -> None:
        self.graph = graph
        self.compute = compute
        self.sampling: Value | None = None
        self.chosen: Value | None = None
        self.blocks: dict[tuple[Value, OrderRows], tuple[Value, ...]] = {}
        self.absorbed = absorbed(graph)
        self.tied = {n.inputs[1] for n in graph.nodes if isinstance(n.op, Linear)}

    def has_kernel(self, node: Node) -> bool:
        return has_kernel(node)

    def node(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """What takes the node's place; `inputs` are its operands, lowered already."""
        b = Emitter()
        b.loc = node.loc
        if node in self.graph.parameter_only:
            return b.make(node.op, inputs).results if inputs != node.inputs else node.results
        if node in self.absorbed:
            return node.results
        return as_tuple(self.lowered(b, node, inputs))

    def lowered(self, b: Emitter, node: Node, inputs: tuple[Value, ...]) -> Value | tuple[Value, ...]:
        """The node in ops that have kernels."""
        op = node.op
        if isinstance(op, Linear | GatedLinear):
            return self._product(b, node, op, inputs)
        if isinstance(op, GroupedLinear):
            raise NoKernel(f"no GPU kernel for {op.name} of {op.groups} groups at {b.loc or 'no place'}")
        if isinstance(op, RopeAppend | QkvAppend | PagedAttention):
            _expects_kernel(b, op)
        if isinstance(op, RopeAppend | QkvAppend):
            return self._append(b, node, op, inputs)
        if isinstance(op, Reshape):  # the same memory
            return b.make(op, inputs).results
        if isinstance(op, NormHeads) and self._joins_append(node, op):
            return b.make(op, tuple(wide(b, v) for v in inputs)).results
        if isinstance(op, RmsNorm | LayerNorm):
            x, *vectors = inputs
            norm = RoundedNorm(op.eps, self._dtype(node), isinstance(op, LayerNorm))
            return self.emit(b, norm, wide(b, x), *(wide(b, v) for v in vectors))
        if isinstance(op, PagedAttention):
            q, *rest = inputs
            return self.emit(b, op, narrow(b, q, self.compute), *rest)
        if isinstance(op, Embedding | QuantizedEmbedding):
            return self._embedding(b, node, op, inputs)
        if isinstance(op, Argmax) and node.results[0] in dict(self.graph.outputs).values() and self.sampling is None:
            return self._select(b, inputs[0])
        if isinstance(op, RotaryTable) and isinstance(inputs[1].op, DynamicFrequencies):
            return dynamic_table(b, op, inputs[1].op, inputs[0])
        return self.kernel_or_parts(b, b.make(op, tuple(_floats(b, v) for v in inputs)))

    def _product(self, b: Emitter, node: Node, op: Linear | GatedLinear, inputs: tuple[Value, ...]) -> Value:
        x, weight, *rest = inputs
        rows, width = weight.type.concrete({})
        format = _format(weight)
        if isinstance(op, GatedLinear):
            if op.bias:
                return self._gated_with_bias(b, node, op, inputs)
            gated = BlockGatedLinear(format, rows, width, op.activation, None, self.compute, self._dtype(node))
            return self.emit(b, gated, x, *self._blocks(b, weight, gated))
        linear = BlockLinear(
            format, rows, width, op.bias, op.activation, op.residual, None, self.compute, self._dtype(node)
        )
        bias = [wide(b, v) for v in rest[: op.bias]]
        residual = [wide(b, v) for v in rest[op.bias :]]
        return self.emit(b, linear, x, *self._blocks(b, weight, linear), *bias, *residual)

    def _gated_with_bias(self, b: Emitter, node: Node, op: GatedLinear, inputs: tuple[Value, ...]) -> Value:
        """Two linears and a product: gated blocks have no place for a bias."""
        x, weight, bias = inputs
        half = weight.type.concrete({})[0] // 2
        parts = []
        for start, activation in ((0, op.activation), (half, "none")):
            rows = (_rows(b, weight, start, start + half), _rows(b, bias, start, start + half))
            linear = Linear(True, activation)
            parts.append(self._product(b, b.make(linear, (wide(b, x), *rows)), linear, (x, *rows)))
        result: Value = b.mul(*parts)
        return result

    def _append(
        self, b: Emitter, node: Node, op: RopeAppend | QkvAppend, inputs: tuple[Value, ...]
    ) -> tuple[Value, ...]:
        """Part of the product that makes queries, keys and values, where that has no other reader and keys and values
        are stored as they are; codes have a scale for a whole head, which no tile need hold."""
        qkv, *rest = inputs
        rotation: tuple[int, str] = (op.rotary_dim, op.layout) if isinstance(op, RopeAppend) else (0, "half")
        heads = (op.num_heads, op.num_kv_heads, op.head_dim, *rotation)
        product = qkv.op
        alone = len(self.graph.uses[node.inputs[0]]) == 1 and not op.scaled and op.head_dim % 2 == 0
        if alone and isinstance(product, BlockLinear) and _plain(product):
            made = BlockAppend(
                product.format, product.width, product.bias, *heads, None, self.compute, self._dtype(node)
            )
            x, bias = qkv.node.inputs[0], qkv.node.inputs[product.rest_at :]
            blocks = self._blocks(b, node.inputs[0].node.inputs[1], made)
            return b.make(made, (x, *blocks, *(b(made.order, v) for v in bias), *rest)).results
        rounded = RoundedAppend(*heads, op.scaled, self._dtype(node))
        if isinstance(qkv.op, NormHeads):
            return b.make(rounded.after(qkv.op), (*qkv.node.inputs, *rest)).results
        return b.make(rounded, (wide(b, qkv), *rest)).results

    def _joins_append(self, node: Node, op: NormHeads) -> bool:
        """Whether a norm becomes part of the appends that read it."""
        readers = [n.op for n, _ in self.graph.uses.get(node.results[0], ())]
        return bool(readers) and all(isinstance(r, RopeAppend | QkvAppend) and takes_norm(r, op) for r in readers)

    def _embedding(
        self, b: Emitter, node: Node, op: Embedding | QuantizedEmbedding, inputs: tuple[Value, ...]
    ) -> Value:
        """Out of blocks where the table is a product's weight too, or in codes; else as it is."""
        ids, table, *scales = inputs
        if isinstance(op, QuantizedEmbedding):
            rows = table.type.shape[0]
            assert isinstance(rows, int)
            made = BlockEmbedding(op.format, rows, op.width)
            return self.emit(b, made, ids, *self._packed_codes(b, made, table, scales[0]))
        if table in self.tied:
            rows, width = table.type.concrete({})
            made = BlockEmbedding("none", rows, width)
            return self.emit(b, made, ids, *self._blocks(b, table, made))
        return self.emit(b, op, ids, table)

    def _select(self, b: Emitter, logits: Value) -> Value:
        """Greedy tokens, and those that the rows' sampling draws: a further input and a further output."""
        words = TensorType(DType.I32, (logits.type.shape[0], SAMPLING_WORDS))
        self.sampling = Value(Node(Input("sampling"), (), (words,)))
        greedy, self.chosen = b.make(SelectTokens(), (logits, self.sampling)).results
        return greedy

    def _blocks(self, b: Emitter, weight: Value, op: Any) -> tuple[Value, ...]:
        """The weight in blocks, and its scales, made once for all their readers."""
        key = (weight.node.inputs[0] if op.format != "none" else weight, op.order)
        if key not in self.blocks:
            self.blocks[key] = block_weight(b, op, weight, self.compute)
        return self.blocks[key]

    def _packed_codes(self, b: Emitter, op: BlockEmbedding, codes: Value, scales: Value) -> tuple[Value, ...]:
        """Codes in blocks, made once for a table and the product that shares them."""
        key = (codes, op.order)
        if key not in self.blocks:
            self.blocks[key] = packed_codes(b, op, codes, scales)
        return self.blocks[key]

    def _dtype(self, node: Node) -> DType:
        """What a node's first result is rounded to: the products' dtype, when nothing else reads it."""
        result = node.results[0]
        readers = self.graph.uses.get(result, ())
        if result in self.graph.results or not readers:
            return DType.F32
        return self.compute if all(_enters_product(n, i) for n, i in readers) else DType.F32


def _enters_product(node: Node, operand: int) -> bool:
    """Whether a node reads an operand only to multiply it with matrices."""
    return operand == 0 and isinstance(node.op, (*_PRODUCTS, PagedAttention))


def _expects_kernel(b: Emitter, op: RopeAppend | QkvAppend | PagedAttention) -> None:
    """Raise `NoKernel` for attributes that no kernel has."""
    if op.value_dim:
        raise NoKernel(f"no GPU kernel for {op.name} with value_dim={op.value_dim} at {b.loc or 'no place'}")


def _plain(op: BlockLinear) -> bool:
    """Whether nothing follows the product but a bias."""
    return op.activation == "none" and not op.residual and op.factor == 1.0 and not op.soft_cap


def _format(weight: Value) -> str:
    """The format of a product's weight."""
    return weight.op.format if isinstance(weight.op, DequantizeWeight) else "none"


def _rows(b: Emitter, array: Value, start: int, stop: int) -> Value:
    """Some rows of an array; of a weight in a format those of its codes and scales, so that it stays in it."""
    if isinstance(array.op, DequantizeWeight):
        return b.one(array.op, *(_rows(b, part, start, stop) for part in array.node.inputs))
    result: Value = b.slice(array, axis=0, start=start, stop=stop)
    return result


def _floats(b: Emitter, x: Value) -> Value:
    """The value in f32, if it is a step's and holds floats: a state keeps its dtype."""
    if not x.type.dtype.is_float or (x.op.leaf and x.type.rank > 2):
        return x
    return wide(b, x)
