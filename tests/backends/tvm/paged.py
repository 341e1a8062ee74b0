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
    [length, q_heads + 2 kv_heads, head_dim] each, and `cos` and `sin` [length, rot_dim / 2]."""

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
    qkv: list[Array] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.scale = self.scale or 1 / math.sqrt(self.head_dim)
        shape = (self.q_heads + 2 * self.kv_heads, self.head_dim)
        self.qkv = [rng.standard_normal((n, *shape)).astype(np.float32) for n in self.lengths]
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
        shapes = (self.head_dim, BLOCK), (BLOCK, self.head_dim)
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
        Kernel(append, self.isa, **self.sizes, **self.rotation)(
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
            qkv[:, self.q_heads :] = np.nan
        if not self.rot_dim:
            return [qkv]
        return [qkv, *(np.concatenate([a[s][p : p + n] for s, p, n in chosen]) for a in (self.cos, self.sin))]

    def attend(self, chosen: list[tuple[int, int, int]], tasks: int) -> Array:
        """`attention` for (sequence, first position, count) groups, f32 [tokens, q_heads · head_dim]."""
        positions = np.concatenate([np.arange(p, p + n) for _, p, n in chosen]).astype(np.int32)
        starts = np.cumsum([0, *[n for _, _, n in chosen]]).astype(np.int32)
        tables = self.tables[[s for s, _, _ in chosen]]
        out = Guarded((len(positions), self.q_heads * self.head_dim), np.float32)
        kernel = Kernel(attention, self.isa, **self.sizes, **self.rotation, scale=self.scale, split=self.split)
        states = [s.array for s in self.states]
        kernel(
            [len(positions), len(chosen), tables.shape[1], 3],
            [*self.rows(chosen), *states, positions, starts, tables, out],
            tasks,
        )
        return out.array

    def decode(self, sequences: list[int], tasks: int) -> tuple[Array, list[Guarded]]:
        """The last token of each sequence by `split_attention` and `combine_splits`: its rows, and the states, which
        did not hold the tokens before."""
        chosen = [(s, self.lengths[s] - 1, 1) for s in sequences]
        states = self.empty()
        for state, full in zip(states, self.states, strict=True):
            state.array[...] = full.array
        slots = np.concatenate([self.slots(s, np.array([p])) for s, p, _ in chosen])
        block, offset = slots // BLOCK, slots % BLOCK
        nothing = self.empty()
        states[0].array[block, :, :, offset] = nothing[0].array[block, :, :, offset]
        for state, poisoned in zip(states[1:], nothing[1:], strict=True):
            state.array[block, :, offset] = poisoned.array[block, :, offset]
        positions = np.array([p for _, p, _ in chosen], np.int32)
        splits = -(-max(self.lengths) // self.split) + 1
        partial = Guarded((len(chosen), splits, self.q_heads * (self.head_dim + 2)), np.float32)
        out = Guarded((len(chosen), self.q_heads * self.head_dim), np.float32)
        tables = self.tables[sequences]
        dims = [len(chosen), len(chosen), tables.shape[1], 3]
        cut = {"split": self.split, "splits": splits}
        Kernel(split_attention, self.isa, **self.sizes, **self.rotation, **cut, scale=self.scale)(
            dims, [*self.rows(chosen, owned=True), slots, *states, positions, tables, partial], tasks
        )
        combine = Kernel(combine_splits, self.isa, q_heads=self.q_heads, head_dim=self.head_dim, **cut)
        combine(dims, [partial.array, positions, out], tasks)
        return out.array, states

    def expected(self, sequence: int) -> tuple[Array, Array]:
        """All rows of a sequence [length, q_heads · head_dim]: in float64, and naively in float32."""
        n, group = self.lengths[sequence], self.q_heads // self.kv_heads
        results = []
        for cast in (f64, f32):
            keys, values = self.stored(sequence, cast)
            turned = rotated(
                cast(self.qkv[sequence]), cast(self.cos[sequence]), cast(self.sin[sequence]), self.rot_dim, self.layout
            )
            out = np.empty((n, self.q_heads, self.head_dim), turned.dtype)
            for p in range(n):
                for h in range(self.q_heads):
                    k, v = (a[: p + 1, h // group] for a in (keys, values))
                    out[p, h] = attend(turned[p, h], k, v, self.scale)
            results.append(out.reshape(n, -1))
        return results[0], results[1]


def attend(q: Array, k: Array, v: Array, scale: float) -> Array:
    """One row: q [head_dim], k and v [n, head_dim], in their dtype; the sums are taken one after another."""
    scores = np.cumsum(k * q, axis=1, dtype=q.dtype)[:, -1] * q.dtype.type(scale)
    weights = np.exp(scores - scores.max())
    total = np.cumsum(weights, dtype=q.dtype)[-1]
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
