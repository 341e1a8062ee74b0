"""Ops of this backend: products over weights in blocks, with what comes before and after them, and results rounded to
the dtype that matrix units take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmc.backends.triton.blocks import natural_weight
from llmc.backends.triton.packing_ops import OrderRows
from llmc.ir.op import Array, Cost, Emitter, Op, Value
from llmc.ir.ops.cache import QkvAppend, RopeAppend, state_count
from llmc.ir.ops.norm import NormHeads
from llmc.ir.types import DType, TensorType


def wide(b: Emitter, x: Value) -> Value:
    """The value in f32."""
    result: Value = x if x.type.dtype is DType.F32 else b.cast(x, dtype=DType.F32)
    return result


def narrow(b: Emitter, x: Value, dtype: DType) -> Value:
    """The value in `dtype`."""
    result: Value = x if x.type.dtype is dtype else b.cast(x, dtype=dtype)
    return result


@dataclass(frozen=True)
class RoundedNorm(Op):
    """`rms_norm`, or `layer_norm` where `centred`, to which a residual is added where there is one, rounded to `dtype`.
    Operands: x f32 [m, n], weight f32 [n], [bias f32 [n]] if `centred`, [residual f32 [m, n]]."""

    eps: float
    dtype: DType
    centred: bool = False
    residual: bool = False

    stage = "step"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        vectors = 2 + self.centred
        norm = b.layer_norm if self.centred else b.rms_norm
        y = norm(*values[:vectors], eps=self.eps)
        return narrow(b, b.add(y, values[vectors]) if self.residual else y, self.dtype)


class _Product(Op, abstract=True):
    """A product with a weight in blocks.

    Operands: x [m, width]; with `norm_eps` the weight f32 [width] of an RMS norm of x, which then is f32; blocks, and
    scales where `format` is one of `llmc.ir.quant`; what the subclass adds. `rows`: of the weight; `order`: how its
    rows are arranged in blocks. x and weight are multiplied in `compute`, and the result is rounded to `dtype`.
    """

    format: str
    rows: int
    width: int
    norm_eps: float | None
    compute: DType
    dtype: DType

    stage = "step"

    @property
    def order(self) -> OrderRows:
        """How the weight's rows are arranged."""
        return OrderRows("natural")

    @property
    def weight_at(self) -> int:
        """Which operand the blocks are."""
        return 1 + (self.norm_eps is not None)

    @property
    def rest_at(self) -> int:
        """Which operand comes after blocks and scales."""
        return self.weight_at + 1 + (self.format != "none")

    def product_operands(self, b: Emitter, values: Sequence[Value]) -> tuple[Value, Value]:
        """x in f32, normalised where that is part of the op, and the weight [rows, width] in its natural order."""
        x = wide(b, values[0])
        if self.norm_eps is not None:
            x = b.rms_norm(x, values[1], eps=self.norm_eps)
        return x, natural_weight(b, self, values[self.weight_at : self.rest_at])


@dataclass(frozen=True)
class BlockLinear(_Product):
    """`linear` over a weight in blocks, times `factor`, and then no larger than `soft_cap` (see `attention`; 0 for no
    limit), before the residual is added. Further operands: bias f32 [rows], residual f32 [m, rows] where they are."""

    format: str
    rows: int
    width: int
    bias: bool
    activation: str
    residual: bool
    norm_eps: float | None
    compute: DType
    dtype: DType
    factor: float = 1.0
    soft_cap: float = 0.0

    def decompose(self, b: Emitter, *values: Value) -> Value:
        at = self.rest_at + self.bias
        options = {"bias": self.bias, "activation": self.activation}
        y = b.linear(*self.product_operands(b, values), *values[self.rest_at : at], **options)
        if self.factor != 1.0:
            y = b.mul_scalar(y, value=self.factor)
        if self.soft_cap:
            y = b.mul_scalar(b.tanh(b.mul_scalar(y, value=1 / self.soft_cap)), value=self.soft_cap)
        if self.residual:
            y = b.add(y, values[at])
        return narrow(b, y, self.dtype)


@dataclass(frozen=True)
class BlockGatedLinear(_Product):
    """`gated_linear` over a weight in blocks, in which a row of gate and its row of up follow each other. `rows` counts
    both. Result [m, rows / 2]."""

    format: str
    rows: int
    width: int
    activation: str
    norm_eps: float | None
    compute: DType
    dtype: DType

    @property
    def order(self) -> OrderRows:
        return OrderRows("gated")

    def decompose(self, b: Emitter, *values: Value) -> Value:
        product = b.gated_linear(*self.product_operands(b, values), activation=self.activation)
        return narrow(b, product, self.dtype)


@dataclass(frozen=True)
class BlockAppend(_Product):
    """The joint projection of queries, keys and values, whose queries and keys are rotated (`rotary_dim` 0: are not)
    and whose keys and values are appended: `linear`, then `rope_append` or `qkv_append`.

    Further operands: bias f32 [rows], ordered as the weight's rows are, where it is; cos, sin f32 [m, rotary_dim / 2]
    where there is a rotation; slot_mapping; the states of keys and values. Results: q [m, num_heads · head_dim], the
    new states.
    """

    format: str
    width: int
    bias: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    layout: str
    norm_eps: float | None
    compute: DType
    dtype: DType

    result_count = 3

    @property
    def rows(self) -> int:  # type: ignore[override]
        """Of the weight."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def order(self) -> OrderRows:
        turned = self.num_heads + self.num_kv_heads if self.rotary_dim else 0
        return OrderRows("heads", self.head_dim, self.rotary_dim, self.layout, turned)

    @property
    def states_at(self) -> int:
        """Which operand the state of keys is."""
        return self.rest_at + self.bias + (2 if self.rotary_dim else 0) + 1

    @property
    def updates(self) -> Mapping[int, int]:  # type: ignore[override]
        """See `Op`."""
        return {self.states_at: 1, self.states_at + 1: 2}

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        at = self.rest_at + self.bias
        bias = (_natural(b, self, v) for v in values[self.rest_at : at])
        qkv = b.linear(*self.product_operands(b, values), *bias, bias=self.bias)
        return appended(b, self, False, qkv, *values[at:])

    def cost(self, *types: TensorType) -> Cost:
        """The states are written where the tokens' slots are, and not read."""
        rows = TensorType(DType.F32, (types[0].shape[0], self.rows))
        written = _append_of(self, False).cost(rows, *types[self.rest_at + self.bias :]).bytes_written
        read = sum(t.bytes for t in types[: self.states_at])
        queries = 2 * rows.elements * self.width + 3 * rows.elements * self.rotary_dim // self.head_dim
        return Cost(queries, read, written)


@dataclass(frozen=True)
class RoundedAppend(Op):
    """`rope_append` (`qkv_append` where `rotary_dim` is 0) whose queries are rounded to `dtype`; with `norm_eps` after
    `norm_heads`, which takes all heads together where `whole`. Operands: qkv f32 [m, (num_heads + 2 · num_kv_heads) ·
    head_dim], [norm's vectors f32], [cos, sin], slot_mapping, the states; results: q, the new states."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    layout: str
    scaled: bool
    dtype: DType
    norm_eps: float | None = None
    centred: bool = False
    whole: bool = False

    stage = "step"

    @property
    def result_count(self) -> int:  # type: ignore[override]
        """Queries and the states."""
        return 1 + state_count(self.scaled)

    def after(self, norm: NormHeads) -> RoundedAppend:
        """The op with a norm before it, for which `takes_norm` holds."""
        whole = norm.query_width != self.head_dim
        return replace(self, norm_eps=norm.eps, centred=norm.centred, whole=whole)

    @property
    def norm(self) -> NormHeads | None:
        """Of the queries and keys."""
        if self.norm_eps is None:
            return None
        return NormHeads(self.norm_eps, *_pieces(self, self.whole), self.centred)

    @property
    def rest_at(self) -> int:
        """Which operand comes after the norm's vectors."""
        return 1 if self.norm_eps is None else 5 if self.centred else 3

    @property
    def states_at(self) -> int:
        """Which operand the state of keys is."""
        return self.rest_at + (3 if self.rotary_dim else 1)

    @property
    def updates(self) -> Mapping[int, int]:  # type: ignore[override]
        """See `Op`."""
        return {self.states_at + i: 1 + i for i in range(state_count(self.scaled))}

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        qkv, norm = values[0], self.norm
        if norm is not None:
            qkv = b.one(norm, *values[: self.rest_at])
        return appended(b, self, self.scaled, qkv, *values[self.rest_at :])

    def cost(self, *types: TensorType) -> Cost:
        plain = _append_of(self, self.scaled).cost(types[0], *types[self.rest_at :])
        if self.norm is None:
            return plain
        flops = self.norm.cost(*types[: self.rest_at]).flops
        vectors = sum(t.bytes for t in types[1 : self.rest_at])
        return Cost(plain.flops + flops, plain.bytes_read + vectors, plain.bytes_written)


def takes_norm(op: RopeAppend | QkvAppend, norm: NormHeads) -> bool:
    """Whether the norm is over each head, or over all together, of what is appended."""
    pieces = (norm.queries, norm.query_width, norm.keys, norm.key_width)
    return pieces in (_pieces(op, False), _pieces(op, True))


def _pieces(op: RopeAppend | QkvAppend | RoundedAppend, whole: bool) -> tuple[int, int, int, int]:
    """How many pieces of the queries are normalised, how wide one is, and the same of the keys."""
    heads, keys, width = op.num_heads, op.num_kv_heads, op.head_dim
    return (1, heads * width, 1, keys * width) if whole else (heads, width, keys, width)


def _natural(b: Emitter, op: BlockAppend, bias: Value) -> Value:
    """A bias in the order of its weight's rows, back in its own."""
    return b.one(replace(op.order, inverse=True), bias)


def appended(b: Emitter, op: BlockAppend | RoundedAppend, scaled: bool, *values: Value) -> tuple[Value, ...]:
    """Queries, rounded as the op says, and the new states."""
    q, *states = b(_append_of(op, scaled), *values)
    return narrow(b, q, op.dtype), *states


def _append_of(op: BlockAppend | RoundedAppend, scaled: bool) -> RopeAppend | QkvAppend:
    if not op.rotary_dim:
        return QkvAppend(op.num_heads, op.num_kv_heads, op.head_dim, scaled)
    return RopeAppend(op.num_heads, op.num_kv_heads, op.head_dim, op.rotary_dim, op.layout, scaled)


@dataclass(frozen=True)
class BlockEmbedding(Op):
    """Rows of a table that is kept in blocks, as the weight of a head that shares it is. Operands: ids i32 [m], blocks,
    and scales where `format` is one of `llmc.ir.quant`; result f32 [m, width]."""

    format: str
    rows: int
    width: int

    stage = "step"

    def decompose(self, b: Emitter, *values: Value) -> Value:
        ids, *weight = values
        result: Value = b.embedding(ids, natural_weight(b, self, weight), dtype=DType.F32)
        return result

    @property
    def order(self) -> OrderRows:
        """See `_Product`."""
        return OrderRows("natural")

    def bytes_read(self, operands: Sequence[TensorType]) -> int:
        """Only the rows that are asked for."""
        ids, *weight = operands
        return ids.bytes + ids.elements * sum(t.bytes for t in weight) // self.rows


@dataclass(frozen=True)
class SelectTokens(Op):
    """The next token of each row of logits. Operands: logits f32 [n, vocab], sampling i32 [n, 8] (see
    `llmc.runtime.batch.Batch`); results i32 [n]: the first maximum, and the token that the row's sampling draws.

    The reference draws nothing: it is what rows with temperature 0 give.
    """

    stage = "step"
    result_count = 2

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 2 and types[0].rank == 2, "logits and sampling", *types)
        logits, sampling = types
        self.expects(sampling == TensorType(DType.I32, (logits.shape[0], SAMPLING_WORDS)), "sampling i32", sampling)
        chosen = TensorType(DType.I32, logits.shape[:1])
        return chosen, chosen

    def reference(self, *arrays: Array) -> tuple[Array, ...]:
        greedy = arrays[0].argmax(-1)
        return greedy, greedy.copy()

    def operations(self, operands: Sequence[TensorType], results: Sequence[TensorType]) -> int:
        return operands[0].elements


SAMPLING_WORDS = 8
"""i32 words that say how a row's token is drawn."""
