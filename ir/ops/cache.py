"""Writing keys and values of a step's tokens into paged state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from llmc.ir.op import Array, Cost, Emitter, Op, Value
from llmc.ir.types import DType, TensorType


@dataclass(frozen=True)
class KvAppend(Op):
    """Writes each token's key and value to its slot (block · block_size + offset; a negative slot is padding).

    Operands: k and v [tokens, num_kv_heads · head_dim], slot_mapping i32 [tokens], key and value states (layouts as in
    `PagedAttention`); results: the new states. Values round to the states' dtype (float64 states, which only the
    interpreter has, keep them as they are).
    """

    num_kv_heads: int
    head_dim: int

    stage = "step"
    result_count = 2
    updates = MappingProxyType({3: 0, 4: 1})

    def infer(self, *types: TensorType) -> tuple[TensorType, ...]:
        self.expects(len(types) == 5 and types[0].rank == 2, "k, v, slot_mapping, key state, value state", *types)
        k, v, slots, key, value = types
        width = self.num_kv_heads * self.head_dim
        self.expects(k == v and k.shape[1] == width, f"k and v [tokens, {width}]", k, v)
        self.expects(slots == TensorType(DType.I32, k.shape[:1]), "slot_mapping i32[tokens]", slots)
        self.expects(key.rank == value.rank == 4, "states of rank 4", key, value)
        self.expects(key.dtype == value.dtype, "states of one dtype", key, value)
        self.expects(key.shape[1:3] == (self.num_kv_heads, self.head_dim), "key state of these heads", key)
        self.expects(
            value.shape == (key.shape[0], key.shape[1], key.shape[3], key.shape[2]), "value state like key", value
        )
        return key, value

    def evaluate(
        self, types: Sequence[TensorType], arrays: Sequence[Array], sizes: Mapping[str, int]
    ) -> tuple[Array, ...]:
        k, v, slots = arrays[:3]
        key, value = arrays[3].copy(), arrays[4].copy()
        size = key.shape[3]
        rounded = np.float64 if types[3].dtype is DType.F64 else np.float32
        stored = types[3].dtype.numpy
        for token, slot in enumerate(slots):
            if slot < 0:
                continue
            block, offset = divmod(int(slot), size)
            heads = (x[token].reshape(self.num_kv_heads, self.head_dim).astype(rounded).astype(stored) for x in (k, v))
            key[block, :, :, offset], value[block, :, offset, :] = heads
        return key, value

    def cost(self, *types: TensorType) -> Cost:
        k, v, slots, key, _ = types
        return Cost(0, k.bytes + v.bytes + slots.bytes, 2 * k.elements * key.dtype.itemsize)


@dataclass(frozen=True)
class QkvAppend(Op):
    """Splits the joint projection, appends its keys and values, returns the queries.

    Operands: qkv [tokens, (num_heads + 2 · num_kv_heads) · head_dim], slot_mapping, key and value states;
    results: q [tokens, num_heads · head_dim], the new states.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    stage = "step"
    result_count = 3
    updates = MappingProxyType({2: 1, 3: 2})

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        qkv, slots, key, value = values
        q, k, v = _split(b, qkv, self.num_heads, self.num_kv_heads, self.head_dim)
        append = KvAppend(self.num_kv_heads, self.head_dim)
        return q, *b(append, k, v, slots, key, value)

    def cost(self, *types: TensorType) -> Cost:
        return _append_cost(types[0], types[1], types[2], self.num_heads, self.num_kv_heads)


@dataclass(frozen=True)
class RopeAppend(Op):
    """`QkvAppend` with queries and keys rotated first (attributes and tables as in `Rope`).

    Operands: qkv, cos, sin, slot_mapping, key and value states; results: q, the new states.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    layout: str = "half"

    stage = "step"
    result_count = 3
    updates = MappingProxyType({4: 1, 5: 2})

    def decompose(self, b: Emitter, *values: Value) -> tuple[Value, ...]:
        qkv, cos, sin, slots, key, value = values
        q, k, v = _split(b, qkv, self.num_heads, self.num_kv_heads, self.head_dim)
        rope = {"head_dim": self.head_dim, "rotary_dim": self.rotary_dim, "layout": self.layout}
        q = b.rope(q, cos, sin, num_heads=self.num_heads, **rope)
        k = b.rope(k, cos, sin, num_heads=self.num_kv_heads, **rope)
        append = KvAppend(self.num_kv_heads, self.head_dim)
        return q, *b(append, k, v, slots, key, value)

    def cost(self, *types: TensorType) -> Cost:
        plain = _append_cost(types[0], types[3], types[4], self.num_heads, self.num_kv_heads)
        rotated = types[0].elements * (self.num_heads + self.num_kv_heads) // (self.num_heads + 2 * self.num_kv_heads)
        tables = types[1].bytes + types[2].bytes
        return Cost(3 * rotated * self.rotary_dim // self.head_dim, plain.bytes_read + tables, plain.bytes_written)


def _split(b: Emitter, qkv: Value, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Value, Value, Value]:
    edges = (0, num_heads * head_dim, (num_heads + num_kv_heads) * head_dim, (num_heads + 2 * num_kv_heads) * head_dim)
    q, k, v = (b.slice(qkv, axis=1, start=edges[i], stop=edges[i + 1]) for i in range(3))
    return q, k, v


def _append_cost(qkv: TensorType, slots: TensorType, key: TensorType, heads: int, kv_heads: int) -> Cost:
    """A step touches only the slots of its tokens, not the whole state."""
    part = qkv.elements // (heads + 2 * kv_heads)
    stored = 2 * part * kv_heads * key.dtype.itemsize
    return Cost(0, qkv.bytes + slots.bytes, part * heads * qkv.dtype.itemsize + stored)
