"""Writing keys and values of a step's tokens into paged state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmc.ir.op import Array, Cost, Emitter, Op, Value
from llmc.ir.types import DType, TensorType


@dataclass(frozen=True)
class KvAppend(Op):
    """Writes each token's key and value to its slot (block · block_size + offset; a negative slot is padding).

    Operands: k [tokens, num_kv_heads · head_dim], v [tokens, num_kv_heads · value_width], slot_mapping i32 [tokens],
    key and value states (layouts and `value_dim` as in `PagedAttention`); results: the new states. Values round to the
    states' dtype, f8e4m3 saturating (see `DType.store`; float64 states, which only the interpreter has, keep them as
    they are).

    `scaled`: the states are i8 codes, and those of their scales follow, f32 [blocks, num_kv_heads, block_size] each. A
    head's key, or value, has one scale (see `quantize_rows`).
    """

    num_kv_heads: int
    head_dim: int
    scaled: bool = False
    value_dim: int = 0

    stage = "step"

    @property
    def result_count(self) -> int:  # type: ignore[override]
        """The states."""
        return state_count(self.scaled)

    @property
    def updates(self) -> Mapping[int, int]:  # type: ignore[override]
        """See `Op`."""
        return {3 + i: i for i in range(self.result_count)}

    @property
    def value_width(self) -> int:
        """Elements of a value."""
        return self.value_dim or self.head_dim

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(
            len(types) == 3 + self.result_count and types[0].rank == 2, "k, v, slot_mapping and the states", *types
        )
        k, v, slots, key, value, *scales = types
        wide, narrow = self.num_kv_heads * self.head_dim, self.num_kv_heads * self.value_width
        self.expects(k.shape[1:] == (wide,), f"k [tokens, {wide}]", k)
        self.expects(v == TensorType(k.dtype, (k.shape[0], narrow)), f"v [tokens, {narrow}] like k", v)
        self.expects(slots == TensorType(DType.I32, k.shape[:1]), "slot_mapping i32[tokens]", slots)
        self.expects(key.rank == value.rank == 4, "states of rank 4", key, value)
        self.expects(key.dtype == value.dtype, "states of one dtype", key, value)
        expects_scales(self, self.scaled, key, scales)
        self.expects(key.shape[1:3] == (self.num_kv_heads, self.head_dim), "key state of these heads", key)
        self.expects(
            value.shape == (key.shape[0], key.shape[1], key.shape[3], self.value_width), "value state like key", value
        )
        return key, value, *scales

    def evaluate(
        self, types: Sequence[TensorType], arrays: Sequence[Array], sizes: Mapping[str, int]
    ) -> tuple[Array, ...]:
        k, v, slots = arrays[:3]
        states = [a.copy() for a in arrays[3:]]
        size = states[0].shape[3]
        rounded = np.float64 if types[3].dtype is DType.F64 else np.float32
        store = types[3].dtype.store
        for token, slot in enumerate(slots):
            if slot < 0:
                continue
            block, offset = divmod(int(slot), size)
            heads: Sequence[Array] = [x[token].reshape(self.num_kv_heads, -1).astype(rounded) for x in (k, v)]
            if self.scaled:
                heads, scales = zip(*(quantize_rows(x) for x in heads), strict=True)
                states[2][block, :, offset], states[3][block, :, offset] = scales
            states[0][block, :, :, offset], states[1][block, :, offset, :] = (store(x) for x in heads)
        return tuple(states)

    def cost(self, *types: TensorType) -> Cost:
        k, v, slots, key, _, *scales = types
        written = (k.elements + v.elements) * key.dtype.itemsize + scale_bytes(k.elements // self.head_dim, scales)
        return Cost(0, k.bytes + v.bytes + slots.bytes, written)


def state_count(scaled: bool) -> int:
    """Keys and values, and their scales."""
    return 4 if scaled else 2


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """Codes (whole numbers from -127 to 127) and scales of rows [n, head_dim]: scale = max |x| / 127 in float32, code =
    x / scale in float32, rounded half to even; code 0 where the scale is 0 or NaN. An infinity makes its row NaN.

    Rows in float64 keep their values, with scale 1: what rounds nothing can be compared exactly.
    """
    if x.dtype == np.float64:
        return x, np.ones(len(x))
    scale = np.abs(x).max(1) / np.float32(127)
    with np.errstate(invalid="ignore", divide="ignore"):
        codes = np.clip(np.rint(x / scale[:, None]), -127, 127)
    return np.where((scale[:, None] > 0) & np.isfinite(codes), codes, 0), scale


def expects_scales(op: Op, scaled: bool, key: TensorType, scales: Sequence[TensorType]) -> None:
    """Raise `TypeMismatch` unless a state of keys and the scales' states fit each other."""
    codes = key.dtype is DType.I8 or (scaled and key.dtype is DType.F64)
    op.expects(codes == scaled, "i8 states with scales, or floats without", key)
    for scale in scales:
        op.expects(scale.dtype.is_float, "scales in floating point", scale)
        op.expects(scale.shape == (key.shape[0], key.shape[1], key.shape[3]), "one scale for each slot and head", scale)


def scale_bytes(slots: int, scales: Sequence[TensorType]) -> int:
    """Bytes of the scales of so many slots and heads."""
    return sum(slots * s.dtype.itemsize for s in scales)


@dataclass(frozen=True)
class QkvAppend(Op):
    """Splits the joint projection, appends its keys and values, returns the queries.

    Operands: qkv [tokens, (num_heads + num_kv_heads) · head_dim + num_kv_heads · value_width], slot_mapping, key and
    value states; results: q [tokens, num_heads · head_dim], the new states. `scaled` and `value_dim` as in `KvAppend`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaled: bool = False
    value_dim: int = 0

    stage = "step"

    @property
    def result_count(self) -> int:  # type: ignore[override]
        """Queries and the states."""
        return 1 + state_count(self.scaled)

    @property
    def updates(self) -> Mapping[int, int]:  # type: ignore[override]
        """See `Op`."""
        return {1 + i: i for i in range(1, self.result_count)}

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        self.expects(len(values) == 1 + self.result_count, "qkv, slot_mapping and the states")
        qkv, slots, *states = values
        q, k, v = _split(b, qkv, self)
        append = KvAppend(self.num_kv_heads, self.head_dim, self.scaled, self.value_dim)
        return q, *b(append, k, v, slots, *states)

    def cost(self, *types: TensorType) -> Cost:
        return _append_cost(self, types[0], types[1], types[2:])


@dataclass(frozen=True)
class RopeAppend(Op):
    """`QkvAppend` with queries and keys rotated first (attributes and tables as in `Rope`); `scaled` and `value_dim` as
    there.

    Operands: qkv, cos, sin, slot_mapping, key and value states; results: q, the new states.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    layout: str = "half"
    scaled: bool = False
    value_dim: int = 0

    stage = "step"

    @property
    def result_count(self) -> int:  # type: ignore[override]
        """Queries and the states."""
        return 1 + state_count(self.scaled)

    @property
    def updates(self) -> Mapping[int, int]:  # type: ignore[override]
        """See `Op`."""
        return {3 + i: i for i in range(1, self.result_count)}

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        self.expects(len(values) == 3 + self.result_count, "qkv, cos, sin, slot_mapping and the states")
        qkv, cos, sin, slots, *states = values
        q, k, v = _split(b, qkv, self)
        rope = {"head_dim": self.head_dim, "rotary_dim": self.rotary_dim, "layout": self.layout}
        q = b.rope(q, cos, sin, num_heads=self.num_heads, **rope)
        k = b.rope(k, cos, sin, num_heads=self.num_kv_heads, **rope)
        append = KvAppend(self.num_kv_heads, self.head_dim, self.scaled, self.value_dim)
        return q, *b(append, k, v, slots, *states)

    def cost(self, *types: TensorType) -> Cost:
        plain = _append_cost(self, types[0], types[3], types[4:])
        rotated = _tokens(types[0]) * (self.num_heads + self.num_kv_heads) * self.rotary_dim
        tables = types[1].bytes + types[2].bytes
        return Cost(3 * rotated, plain.bytes_read + tables, plain.bytes_written)


def joint_edges(num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int = 0) -> tuple[int, int, int]:
    """The columns of a joint projection at which queries, keys and values end."""
    queries, keys = num_heads * head_dim, num_kv_heads * head_dim
    return queries, queries + keys, queries + keys + num_kv_heads * (value_dim or head_dim)


def _split(b: Emitter, qkv: Value, op: QkvAppend | RopeAppend) -> tuple[Value, Value, Value]:
    edges = (0, *joint_edges(op.num_heads, op.num_kv_heads, op.head_dim, op.value_dim))
    op.expects(qkv.type.shape[1:] == edges[-1:], f"qkv [tokens, {edges[-1]}]", qkv.type)
    q, k, v = (b.slice(qkv, axis=1, start=edges[i], stop=edges[i + 1]) for i in range(3))
    return q, k, v


def _append_cost(op: QkvAppend | RopeAppend, qkv: TensorType, slots: TensorType, states: Sequence[TensorType]) -> Cost:
    """A step touches only the slots of its tokens, not the whole state."""
    queries, _, end = joint_edges(op.num_heads, op.num_kv_heads, op.head_dim, op.value_dim)
    tokens = _tokens(qkv)
    stored = tokens * (end - queries) * states[0].dtype.itemsize + scale_bytes(tokens * op.num_kv_heads, states[2:])
    return Cost(0, qkv.bytes + slots.bytes, tokens * queries * qkv.dtype.itemsize + stored)


def _tokens(qkv: TensorType) -> int:
    return TensorType(qkv.dtype, qkv.shape[:1]).elements
