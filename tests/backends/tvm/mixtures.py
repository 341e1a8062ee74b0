"""Random mixtures of experts, and their rows by expert, for the tests of kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from llmc.backends.tvm.isa import ISAS
from llmc.backends.tvm.packing import pack, pack_gated
from tests.backends.tvm.machine import Array, Guarded, runs_here, same_bits, stored
from tests.backends.tvm.test_linear import activation

ALL = [isa for isa in ISAS.values() if runs_here(isa)]
every_isa = pytest.mark.parametrize("isa", ALL, ids=lambda isa: isa.name)
HERE = [isa for isa in ALL if not isa.bf16_dot]
every_integer_isa = pytest.mark.parametrize("isa", HERE, ids=lambda isa: isa.name)


def draw_weights(rng: np.random.Generator, tokens: int, experts: int, each: int, spread: int) -> Array:
    """At most `each` of the first `spread` experts for a token, now and then fewer."""
    weights = np.zeros((tokens, experts), np.float32)
    for row in weights:
        count = int(rng.integers(1, each + 1)) if rng.random() < 0.2 else each
        row[rng.choice(spread, min(count, spread), replace=False)] = rng.random(min(count, spread)) + 0.1
    return weights


class Grouped:
    """Rows by expert as the kernels are to put them, from weights [tokens, experts]."""

    def __init__(self, weights: Array, each: int) -> None:
        self.tokens, self.experts = weights.shape
        self.source = np.concatenate([np.flatnonzero(weights[:, e]) for e in range(self.experts)])
        self.starts = np.cumsum([0, *(weights != 0).sum(0)]).astype(np.int32)
        self.places = np.full((self.tokens, each), -1, np.int32)
        self.shares = np.zeros((self.tokens, each), np.float32)
        for t, row in enumerate(weights):
            for j, e in enumerate(np.flatnonzero(row)):
                here = self.source[self.starts[e] : self.starts[e + 1]]
                self.places[t, j] = self.starts[e] + int(np.flatnonzero(here == t)[0])
                self.shares[t, j] = row[e]

    @property
    def total(self) -> int:
        return int(self.starts[-1])

    def outputs(self) -> list[Guarded]:
        return [Guarded(a.shape, a.dtype) for a in (self.starts, self.places, self.shares)]

    def check(self, outputs: list[Guarded]) -> None:
        for found, wanted in zip(outputs, (self.starts, self.places, self.shares), strict=True):
            assert same_bits(found.array, wanted)


tokens_ = st.sampled_from([1, 2, 3, 7, 13, 40])


class Mixture:
    """Random weights of experts, of which those that nobody chose are NaN in what kernels are given."""

    def __init__(self, rng: np.random.Generator, experts: int, hidden: int, inner: int, dtype: str) -> None:
        self.sizes = experts, hidden, inner
        self.dtype = dtype
        scale = 1 / math.sqrt(hidden), 1 / math.sqrt(inner)
        self.gate_up = stored(rng.standard_normal((experts, 2 * inner, hidden)) * scale[0], dtype)
        self.down = stored(rng.standard_normal((experts, hidden, inner)) * scale[1], dtype)
        self.gate_up_bias = rng.standard_normal((experts, 2 * inner)).astype(np.float32)
        self.down_bias = rng.standard_normal((experts, hidden)).astype(np.float32)

    def poisoned(self, weights: Array, values: Array) -> Array:
        """A copy without what is of experts that have no weight."""
        values = values.copy()
        values[(weights == 0).all(0)] = np.nan
        return values

    def packed_gate_up(self, weights: Array) -> Array:
        inner = self.sizes[2]
        return np.stack([pack_gated(w[:inner], w[inner:]) for w in self.poisoned(weights, self.gate_up)])

    def packed_down(self, weights: Array) -> Array:
        return np.stack([pack(w) for w in self.poisoned(weights, self.down)])

    def packed_bias(self) -> Array:
        inner = self.sizes[2]
        return np.stack([pack_gated(b[:inner, None], b[inner:, None]) for b in self.gate_up_bias])


def gate(both: Array, name: str, gating: str, limit: float) -> Array:
    """Gate, then up, to their product, in the dtype of both."""
    first, up = np.split(both, 2, axis=-1)
    if gating == "product":
        return np.asarray(activation(name, first) * up)
    number = both.dtype.type
    return np.asarray(
        activation("gelu_sigmoid", np.minimum(first, number(limit))) * (np.clip(up, -limit, limit) + number(1))
    )


def joined(parts: dict[Any, list[Array]]) -> tuple[Array, Array]:
    """Of all experts, the naive result and the truth."""
    return np.concatenate(parts[np.float32]), np.concatenate(parts[np.float64])


GATINGS = [("silu", "product", 0.0), ("gelu_tanh", "product", 0.0), ("none", "clamped", 0.8)]
