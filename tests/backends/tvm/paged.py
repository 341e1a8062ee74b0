"""A ragged batch for the attention kernels: random projections, shuffled block tables, NaN in all other slots."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from llmc.backends.tvm.isa import Isa
from llmc.backends.tvm.kernels.attention import attention
from llmc.backends.tvm.kernels.cache import append
from llmc.backends.tvm.kernels.decode import combine_splits, split_attention
from tests.backends.tvm.machine import DTYPES, Array, Guarded, Kernel, f32, f64

BLOCK = 16
KV_DTYPES: dict[str, np.dtype[Any]] = {**DTYPES, "i8": np.dtype(np.int8)}


@dataclass
class Batch:
    """Sequences of the given lengths, written token by token; all that tokens project to is in `qkv`, f32
    [length, row] each: queries, keys, values; and `cos` and `sin` [length, rot_dim / 2]. `kind`: what else attention
    may have (`value_dim`, `window`, `soft_cap`, `alibi`, `sinks`, as kernels take them).

    Blocks before the window of a sequence's first query are unowned where there is `forgotten`: so many tokens, of each
    sequence, whose keys and values nothing may read any more.
    """

    isa: Isa
    q_heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    lengths: list[int]
    seed: int
    rot_dim: int = 0
    layout: str = "half"
    split: int = 256
    scale: float = 0.0
    kind: dict[str, Any] = field(default_factory=dict)
    qkv: list[Array] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.scale = self.scale or 1 / math.sqrt(self.head_dim)
        self.slopes = (2.0 ** -rng.uniform(0, 8, self.q_heads)).astype(np.float32)
        self.sinks = rng.standard_normal(self.q_heads).astype(np.float32) * 2
        self.qkv = [rng.standard_normal((n, self.row)).astype(np.float32) for n in self.lengths]
        angles = [rng.uniform(0, 6, (n, self.rot_dim // 2)) for n in self.lengths]
        self.cos, self.sin = ([g(a).astype(np.float32) for a in angles] for g in (np.cos, np.sin))
        needed = [-(-n // BLOCK) for n in self.lengths]
        self.blocks = sum(needed) + 3
        free = list(rng.permutation(self.blocks))
        width = max(needed) + 2
        # Past the end of a sequence a table holds anything.
        self.tables = rng.integers(-(2**31), 2**31, (len(self.lengths), width)).astype(np.int32)
        for s, count in enumerate(needed):
            self.tables[s, :count] = [free.pop() for _ in range(count)]

    @property
    def value_dim(self) -> int:
        """Elements of a value."""
        return int(self.kind.get("value_dim", 0)) or self.head_dim

    @property
    def row(self) -> int:
        """Elements of a token's queries, keys and values."""
        return (self.q_heads + self.kv_heads) * self.head_dim + self.kv_heads * self.value_dim

    def kinds(self, *names: str) -> dict[str, Any]:
        """Those parameters of the kind."""
        return {name: self.kind[name] for name in names if name in self.kind}

    def vectors(self, *names: str) -> list[Array]:
        """Slopes and sinks, where the kind has them."""
        found = {"alibi": self.slopes, "sinks": self.sinks}
        return [found[name] for name in names if self.kind.get(name)]

    @property
    def sizes(self) -> dict[str, Any]:
        """The parameters that kernels share."""
        return {
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "kv_dtype": self.kv_dtype,
        }

    @property
    def scaled(self) -> bool:
        """Whether the states are codes with scales."""
        return self.kv_dtype == "i8"

    @property
    def rotation(self) -> dict[str, Any]:
        """What says how queries and keys are rotated."""
        return {"rot_dim": self.rot_dim, "layout": self.layout}

    def empty(self) -> list[Guarded]:
        """States in which everything is NaN (codes: -1, of scale NaN)."""
        dtype = KV_DTYPES[self.kv_dtype]
        shapes = (self.head_dim, BLOCK), (BLOCK, self.value_dim)
        states = [Guarded((self.blocks, self.kv_heads, *shape), dtype) for shape in shapes]
        if self.scaled:
            states += [Guarded((self.blocks, self.kv_heads, BLOCK), np.float32) for _ in range(2)]
        return states

    def slots(self, sequence: int, positions: Array) -> Array:
        """The slots of a sequence's positions."""
        return np.asarray(self.tables[sequence, positions // BLOCK] * BLOCK + positions % BLOCK, np.int32)

    @cached_property
    def states(self) -> list[Guarded]:
        """States with every token's key and value."""
        states = self.empty()
        slots = np.concatenate([self.slots(s, np.arange(n)) for s, n in enumerate(self.lengths)])
        tables = [np.concatenate(self.cos), np.concatenate(self.sin)] if self.rot_dim else []
        Kernel(append, self.isa, **self.sizes, **self.rotation, **self.kinds("value_dim"))(
            [len(slots)], [np.concatenate(self.qkv), *tables, slots, *states]
        )
        return states

    def stored(self, sequence: int, cast: Callable[[Array], Array]) -> tuple[Array, Array]:
        """The keys and values of a sequence as they are stored, [length, kv_heads, head_dim] in the dtype of `cast`."""
        key, value, *scales = (s.array for s in self.states)
        positions = np.arange(self.lengths[sequence])
        block, offset = self.tables[sequence, positions // BLOCK], positions % BLOCK
        keys, values = cast(key[block, :, :, offset]), cast(value[block, :, offset])
        if scales:
            keys, values = (
                x * cast(s[block, :, offset])[:, :, None] for x, s in zip((keys, values), scales, strict=True)
            )
        return keys, values

    def rows(self, chosen: list[tuple[int, int, int]], owned: bool = False) -> list[Array]:
        """qkv, cos and sin of (sequence, first position, count) groups. Keys and values are NaN unless `owned`."""
        qkv = np.concatenate([self.qkv[s][p : p + n] for s, p, n in chosen])
        if not owned:
            qkv[:, self.q_heads * self.head_dim :] = np.nan
        if not self.rot_dim:
            return [qkv]
        return [qkv, *(np.concatenate([a[s][p : p + n] for s, p, n in chosen]) for a in (self.cos, self.sin))]

    def attend(self, chosen: list[tuple[int, int, int]], tasks: int) -> Array:
        """`attention` for (sequence, first position, count) groups, f32 [tokens, q_heads · value_dim]."""
        positions = np.concatenate([np.arange(p, p + n) for _, p, n in chosen]).astype(np.int32)
        starts = np.cumsum([0, *[n for _, _, n in chosen]]).astype(np.int32)
        tables = np.stack([self.seen_table(s, p) for s, p, _ in chosen])
        out = Guarded((len(positions), self.q_heads * self.value_dim), np.float32)
        kernel = Kernel(
            attention, self.isa, **self.sizes, **self.rotation, **self.kind, scale=self.scale, split=self.split
        )
        states = self.forgotten([s.array for s in self.states], [(s, p) for s, p, _ in chosen])
        kernel(
            [len(positions), len(chosen), tables.shape[1], 3],
            [*self.rows(chosen), *states, positions, starts, tables, *self.vectors("alibi", "sinks"), out],
            tasks,
        )
        return out.array

    def first_seen(self, position: int) -> int:
        """The first position that a token sees."""
        window = self.kind.get("window", 0)
        return max(0, position - window + 1) if window else 0

    def seen_table(self, sequence: int, position: int) -> Array:
        """A sequence's table, in which entries before a token's window are anything."""
        table = np.array(self.tables[sequence])
        before = self.first_seen(position) // BLOCK
        table[:before] = np.random.default_rng(before).integers(-(2**31), 2**31, before)
        return table

    def forgotten(self, states: list[Array], chosen: list[tuple[int, int]]) -> list[Array]:
        """Copies of states in which what is before the windows of (sequence, position) is NaN (codes: -1)."""
        if not self.kind.get("window"):
            return states
        copies = [s.copy() for s in states]
        for sequence, position in chosen:
            before = np.arange(self.first_seen(position))
            block, offset = self.tables[sequence, before // BLOCK], before % BLOCK
            nothing = np.array(-1, copies[0].dtype) if self.scaled else np.array(np.nan, copies[0].dtype)
            copies[0][block, :, :, offset], copies[1][block, :, offset] = nothing, nothing
            for scale in copies[2:]:
                scale[block, :, offset] = np.nan
        return copies

    def decode(self, sequences: list[int], tasks: int) -> tuple[Array, list[Guarded]]:
        """The last token of each sequence by `split_attention` and `combine_splits`: its rows, and the states, which
        did not hold the tokens before."""
        chosen = [(s, self.lengths[s] - 1, 1) for s in sequences]
        states = self.empty()
        for state, full in zip(states, self.states, strict=True):
            state.array[...] = full.array
        last = [(s, p) for s, p, _ in chosen]
        before = self.forgotten([s.array for s in states], last)
        for state, copy in zip(states, before, strict=True):
            state.array[...] = copy
        slots = np.concatenate([self.slots(s, np.array([p])) for s, p, _ in chosen])
        block, offset = slots // BLOCK, slots % BLOCK
        nothing = self.empty()
        states[0].array[block, :, :, offset] = nothing[0].array[block, :, :, offset]
        for state, poisoned in zip(states[1:], nothing[1:], strict=True):
            state.array[block, :, offset] = poisoned.array[block, :, offset]
        positions = np.array([p for _, p, _ in chosen], np.int32)
        splits = -(-max(self.lengths) // self.split) + 1
        partial = Guarded((len(chosen), splits, self.q_heads * (self.value_dim + 2)), np.float32)
        out = Guarded((len(chosen), self.q_heads * self.value_dim), np.float32)
        tables = np.stack([self.seen_table(s, p) for s, p in last])
        dims = [len(chosen), len(chosen), tables.shape[1], 3]
        cut = {"split": self.split, "splits": splits}
        kind = self.kinds("value_dim", "window", "soft_cap", "alibi")
        Kernel(split_attention, self.isa, **self.sizes, **self.rotation, **cut, **kind, scale=self.scale)(
            dims,
            [*self.rows(chosen, owned=True), slots, *states, positions, tables, *self.vectors("alibi"), partial],
            tasks,
        )
        kind = self.kinds("window", "sinks")
        combine = Kernel(combine_splits, self.isa, q_heads=self.q_heads, head_dim=self.value_dim, **cut, **kind)
        combine(dims, [partial.array, positions, *self.vectors("sinks"), out], tasks)
        return out.array, states

    def expected(self, sequence: int) -> tuple[Array, Array]:
        """All rows of a sequence [length, q_heads · value_dim]: in float64, and naively in float32."""
        n, group = self.lengths[sequence], self.q_heads // self.kv_heads
        results = []
        for cast in (f64, f32):
            keys, values = self.stored(sequence, cast)
            queries = self.qkv[sequence][:, : self.q_heads * self.head_dim].reshape(n, self.q_heads, self.head_dim)
            turned = rotated(
                cast(queries), cast(self.cos[sequence]), cast(self.sin[sequence]), self.rot_dim, self.layout
            )
            out = np.empty((n, self.q_heads, self.value_dim), turned.dtype)
            slopes, sinks = cast(self.slopes), cast(self.sinks)
            for p in range(n):
                first = self.first_seen(p)
                for h in range(self.q_heads):
                    k, v = (a[first : p + 1, h // group] for a in (keys, values))
                    bias = slopes[h] * np.arange(first - p, 1, dtype=k.dtype) if self.kind.get("alibi") else None
                    sink = sinks[h] if self.kind.get("sinks") else None
                    out[p, h] = attend(turned[p, h], k, v, self.scale, self.kind.get("soft_cap", 0.0), bias, sink)
            results.append(out.reshape(n, -1))
        return results[0], results[1]


def attend(
    q: Array, k: Array, v: Array, scale: float, soft_cap: float = 0.0, bias: Array | None = None, sink: Any = None
) -> Array:
    """One row: q [head_dim], k [n, head_dim], v [n, value_dim], in their dtype; the sums are taken one after another.
    `bias` [n] is added to the scores; `sink` is one more logit, without a value."""
    scores = np.cumsum(k * q, axis=1, dtype=q.dtype)[:, -1] * q.dtype.type(scale)
    if soft_cap:
        scores = np.tanh(scores / q.dtype.type(soft_cap)) * q.dtype.type(soft_cap)
    if bias is not None:
        scores = scores + bias
    largest = scores.max() if sink is None else max(scores.max(), sink)
    weights = np.exp(scores - largest)
    total = np.cumsum(weights, dtype=q.dtype)[-1]
    if sink is not None:
        total = total + np.exp(sink - largest)
    return np.asarray(np.cumsum(weights[:, None] * v, axis=0, dtype=q.dtype)[-1] / total)


def rotated(x: Array, cos: Array, sin: Array, rot_dim: int, layout: str) -> Array:
    """x [tokens, heads, head_dim] in its dtype."""
    y = x.copy()
    c, s = cos[:, None], sin[:, None]
    half = rot_dim // 2
    first, second = (
        (slice(0, half), slice(half, rot_dim)) if layout == "half" else (slice(0, rot_dim, 2), slice(1, rot_dim, 2))
    )
    y[..., first] = x[..., first] * c - x[..., second] * s
    y[..., second] = x[..., second] * c + x[..., first] * s
    return y
