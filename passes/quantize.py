"""Weights in a format of codes and scales; products with them take their activations in 8 bits, or as they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmc.ir.errors import LlmcError, nearest
from llmc.ir.graph import Graph, Input, Param
from llmc.ir.op import Emitter, Node, Op, Value
from llmc.ir.ops.embedding import Embedding
from llmc.ir.ops.experts import Experts
from llmc.ir.ops.linear import GatedLinear, Linear
from llmc.ir.ops.quantized import (
    DequantizeWeight,
    QuantizedEmbedding,
    QuantizedGatedLinear,
    QuantizedLinear,
    QuantizeWeight,
)
from llmc.ir.ops.quantized_experts import QuantizedExperts
from llmc.ir.ops.routing import Routing
from llmc.ir.ops.shape import Reshape
from llmc.ir.quant import FORMATS, INTEGER_FORMATS
from llmc.ir.types import DType, Shape
from llmc.passes.base import Pass, PassContext

NONE = "none"
"""Keeps a part in the dtype that it has."""

INT8, KEPT = "int8", "kept"
"""What products do with their activations: round them to 8 bits and multiply integers, or take them as they are."""


def takes(activations: str) -> list[str]:
    """What a part may be asked for as, with such activations."""
    return [NONE, *(INTEGER_FORMATS if activations == INT8 else FORMATS)]


def refusal(format: str, activations: str) -> str | None:
    """Why there are no such weights with such activations; None where there are."""
    if format in takes(activations):
        return None
    if format in FORMATS:
        return (
            f"{format} is for GPU targets only, where activations keep their dtype; a CPU target takes"
            f" {', '.join(takes(activations))}"
        )
    return f"there is no weight format {format!r}; {nearest(format, takes(activations))}"


@dataclass(frozen=True)
class Quantize(Pass):
    """`linear`, `gated_linear`, `experts` and `embedding` become their quantized forms, over `quantize_weight` of the
    weight. With `activations` "kept", products stay and read `dequantize_weight` of it: the kernel for the two is the
    backend's.

    `format` is for linears and experts; `lm_head` for the linear that makes `logits`, like `format` unless given;
    `embedding` for the table of token_ids, which is kept unless given, but for a table that is the head's weight too:
    that has the head's format. `none` keeps a part in its dtype. A linear whose result a routing reads is kept: it is
    small, and it decides. Readers of one weight share its codes. `grouped_linear` keeps its weights: they are a
    fiftieth of a model's, and all scores and values of attention pass through them.

    Raises `LlmcError` for a format that does not exist, and for a table of which head and embedding disagree,
    and for one that activations in 8 bits do not go with.
    """

    name = "quantize"
    stage = "fused"
    tolerance = 1.0  # numbers change, but not beyond their own size; tests/passes/test_quantize.py says to what

    format: str
    lm_head: str | None = None
    embedding: str | None = None
    activations: str = INT8

    def __post_init__(self) -> None:
        if self.activations not in (INT8, KEPT):
            raise LlmcError(f"activations are {INT8} or {KEPT}, given {self.activations!r}")
        for part, given in (("format", self.format), ("lm_head", self.lm_head), ("embedding", self.embedding)):
            reason = None if given is None else refusal(given, self.activations)
            if reason is not None:
                raise LlmcError(f"{part}: {reason}")

    @property
    def head(self) -> str:
        """The format of the linear that makes logits."""
        return self.format if self.lm_head is None else self.lm_head

    def table(self, tied: bool) -> str:
        """The format of the table of tokens; `tied` says whether it is the head's weight."""
        if not tied:
            return NONE if self.embedding is None else self.embedding
        if self.embedding not in (None, self.head):
            raise LlmcError(
                f"the embedding is asked for as {self.embedding} and the lm_head as {self.head}, but they are one"
                " tensor; give both the same format, or leave the embedding out"
            )
        return self.head

    def run(self, graph: Graph, context: PassContext) -> Graph:
        quantizing = _Quantizing(self, graph, context)
        return graph.map(quantizing.emit)


@dataclass
class _Quantizing:
    options: Quantize
    graph: Graph
    context: PassContext
    codes: dict[tuple[Value, str], tuple[Value, Value]] = field(default_factory=dict)
    """Codes and scales by weight and format."""
    weights: dict[tuple[Value, str], Value] = field(default_factory=dict)
    """What codes and scales say, by weight and format."""

    def __post_init__(self) -> None:
        self.head = head_of(self.graph)
        self.routers = {n.inputs[0].node for n in self.graph.nodes if isinstance(n.op, Routing)}

    def emit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """What takes the node's place."""
        b = Emitter()
        b.loc = node.loc
        kept = node.results if inputs == node.inputs else b.make(node.op, inputs).results
        format = self._format(node)
        weights = node.inputs[2:4] if isinstance(node.op, Experts) else node.inputs[1:2]
        if format == NONE or not all(map(self._is_weight, weights)):
            return kept
        if not self.context.fire(f"quantized-{node.op.name}"):
            return kept
        if isinstance(node.op, Experts):
            return (self._experts(b, node.op, inputs, format),)
        first, weight, *rest = inputs
        if self.options.activations == KEPT and not isinstance(node.op, Embedding):
            return b.make(node.op, (first, self._dequantized(b, weight, format), *rest)).results
        return b.make(_quantized(node.op, format, weight), (first, *self._quantized(b, weight, format), *rest)).results

    def _experts(self, b: Emitter, op: Experts, inputs: tuple[Value, ...], format: str) -> Value:
        """The experts, whose weights [experts, n, k] are quantized as one matrix each."""
        x, weights, *stored = inputs[:4]
        matrices = [b.one(Reshape(_matrix_shape(w)), w) for w in stored]
        if self.options.activations == KEPT:
            wide = [
                b.one(Reshape(w.type.shape), self._dequantized(b, m, format))
                for m, w in zip(matrices, stored, strict=True)
            ]
            return b.one(op, x, weights, *wide, *inputs[4:])
        codes = [v for m in matrices for v in self._quantized(b, m, format)]
        quantized = QuantizedExperts(format, op.activation, op.gating, op.bias, op.limit, op.experts_per_token)
        return b.one(quantized, x, weights, *codes, *inputs[4:])

    def _format(self, node: Node) -> str:
        """The format of the weight that a node reads."""
        if isinstance(node.op, Experts) and node.types[0].dtype is DType.F32:
            return self.options.format
        if node in self.routers:
            return NONE
        if isinstance(node.op, Linear | GatedLinear) and node.types[0].dtype is DType.F32:
            return self.options.head if node is self.head else self.options.format
        if isinstance(node.op, Embedding) and node.op.dtype is DType.F32 and _is_tokens(node.inputs[0]):
            return self.options.table(self.head is not None and self.head.inputs[1] == node.inputs[1])
        return NONE

    def _is_weight(self, value: Value) -> bool:
        return isinstance(value.op, Param) or value.node in self.graph.parameter_only

    def _quantized(self, b: Emitter, weight: Value, format: str) -> tuple[Value, Value]:
        """Codes and scales of a weight, made once for all its readers."""
        key = (weight, format)
        if key not in self.codes:
            codes, scales = b.make(QuantizeWeight(format), (weight,)).results
            self.codes[key] = codes, scales
        return self.codes[key]

    def _dequantized(self, b: Emitter, weight: Value, format: str) -> Value:
        """The weight f32 as its codes say, made once for all its readers."""
        key = (weight, format)
        if key not in self.weights:
            dequantize = DequantizeWeight(format, _width(weight))
            self.weights[key] = b.one(dequantize, *self._quantized(b, weight, format))
        return self.weights[key]


def head_of(graph: Graph) -> Node | None:
    """The linear that makes logits, behind elementwise ops (a scale, a soft cap); None where there is none."""
    value = dict(graph.outputs).get("logits")
    while value is not None and not isinstance(value.op, Linear):
        carriers = [v for v in value.node.inputs if v.type.shape == value.type.shape]
        value = carriers[0] if value.op.elementwise and len(set(carriers)) == 1 else None
    return None if value is None else value.node


def _is_tokens(ids: Value) -> bool:
    return isinstance(ids.op, Input) and ids.op.label == "token_ids"


def _quantized(op: Op, format: str, weight: Value) -> Op:
    """The op that reads codes where `op` reads a weight."""
    if isinstance(op, Linear):
        return QuantizedLinear(format, op.bias, op.activation, op.residual)
    if isinstance(op, GatedLinear):
        return QuantizedGatedLinear(format, op.activation, op.bias)
    return QuantizedEmbedding(format, _width(weight))


def _matrix_shape(weight: Value) -> Shape:
    """Of weights [experts, n, k]: [experts · n, k]."""
    experts, rows, width = weight.type.concrete({})
    return experts * rows, width


def _width(weight: Value) -> int:
    width = weight.type.shape[1]
    assert isinstance(width, int)
    return width
