"""Kernels of a mixture of experts: against float64, with every matrix that nobody chose full of NaN, and bit for bit
whatever a token is batched with and however the work is shared."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.isa import ISAS, Isa
from llmc.backends.tvm.kernels.experts import combine_experts, group_rows, group_tiles
from llmc.backends.tvm.kernels.linear import experts_gated_linear, experts_linear
from llmc.backends.tvm.kernels.quantized import experts_quantized_gated_linear, experts_quantized_linear
from llmc.backends.tvm.kernels.routing import routing
from llmc.backends.tvm.packing import interleave, pack, pack_codes, pack_gated
from llmc.ir.ops.routing import Routing
from llmc.ir.types import DType, TensorType
from tests.backends.tvm.machine import DTYPES, Array, Guarded, Kernel, f32, f64, runs_here, same_bits, stored
from tests.backends.tvm.test_linear import activation
from tests.backends.tvm.test_quantized import Tiles, quantized
from tests.tolerance import assert_as_good_as

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


@every_isa
@settings(max_examples=6)
@given(
    tokens=tokens_,
    experts=st.integers(3, 9),
    each=st.integers(1, 3),
    width=st.integers(1, 100),
    tasks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_grouping(isa: Isa, tokens: int, experts: int, each: int, width: int, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = draw_weights(rng, tokens, experts, each, experts)
    weights[-1, weights[-1] != 0] = np.nan
    grouped = Grouped(weights, each)
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    rows, outputs = Guarded((tokens * each, width), np.float32), grouped.outputs()
    sizes: dict[str, Any] = {"rows_dim": 3, "experts": experts, "per_token": each, "width": width}
    Kernel(group_rows, isa, **sizes)([7, 7, 7, tokens], [x, weights, rows, *outputs], tasks)
    grouped.check(outputs)
    assert same_bits(rows.array[: grouped.total], x[grouped.source])
    assert np.isnan(rows.array[grouped.total :]).all(), "rows of nobody are not written"

    tiles, made, outputs = quantized(x), Tiles(tokens * each, width), grouped.outputs()
    words = Guarded((*made.codes.array.shape[:2], 8), np.int32)
    places = [words, made.scales, made.offsets]
    Kernel(group_tiles, isa, **sizes)([7, 7, 7, tokens], [*tiles.inputs, weights, *places, *outputs], tasks)
    grouped.check(outputs)
    used = slice(0, grouped.total)
    assert same_bits(
        np.ascontiguousarray(words.array[:, used]), tiles.inputs[0].reshape(-1, tokens, 8)[:, grouped.source]
    )
    for found, given_ in ((made.scales, tiles.scales), (made.offsets, tiles.offsets)):
        assert same_bits(np.ascontiguousarray(found.array[:, used]), given_.array[:, grouped.source])


def test_a_token_with_more_weights_than_places_writes_none_beyond_them() -> None:
    weights = np.ones((2, 3), np.float32)
    expected = np.array([[1, 1, 0], [1, 1, 0]], np.float32)
    grouped = Grouped(expected, 2)
    rows, outputs = Guarded((4, 5), np.float32), grouped.outputs()
    x = np.arange(10, dtype=np.float32).reshape(2, 5)
    kernel = Kernel(group_rows, HERE[0], rows_dim=0, experts=3, per_token=2, width=5)
    kernel([2], [x, weights, rows, *outputs], 2)
    grouped.check(outputs)


@every_isa
@settings(max_examples=6)
@given(tokens=tokens_, each=st.integers(1, 4), width=st.sampled_from([1, 17, 64, 300, 513]), tasks=st.integers(1, 4))
def test_the_weighted_sum(isa: Isa, tokens: int, each: int, width: int, tasks: int) -> None:
    rng = np.random.default_rng(width)
    many = max(tokens, -(-2000 // width))
    weights = draw_weights(rng, many, 6, each, 6)
    grouped = Grouped(weights, each)
    rows = rng.standard_normal((many * each, width)).astype(np.float32)
    rows[grouped.total :] = np.nan
    kernel = Kernel(combine_experts, isa, rows_dim=0, per_token=each, width=width)
    y = Guarded((many, width), np.float32)
    kernel([many], [rows, grouped.places, grouped.shares, y], tasks)
    naive, truth = np.zeros((many, width), np.float32), np.zeros((many, width))
    for t, j in np.ndindex(many, each):
        if grouped.places[t, j] >= 0:
            naive[t] += grouped.shares[t, j] * rows[grouped.places[t, j]]
            truth[t] += f64(grouped.shares)[t, j] * f64(rows)[grouped.places[t, j]]
    assert_as_good_as(y.array, naive, truth)
    few = Guarded((1, width), np.float32)
    kernel([1], [rows, grouped.places[-1:], grouped.shares[-1:], few], 1)
    assert same_bits(few.array[0], y.array[-1])


ROUTINGS = [
    Routing(2, "softmax", True, 1.0),
    Routing(3, "softmax", False, 2.5),
    Routing(3, "softmax", False, 16.0, 3, 2),
    Routing(2, "softmax", True, 1.0, bias=True),
    Routing(1, "sigmoid", False, 1.0),
    Routing(4, "sigmoid", True, 2.5, 3, 2, "top2", True),
    Routing(2, "sigmoid", True, 2.5, 3, 1),
]


def route(isa: Isa, op: Routing, logits: Array, bias: Array, tasks: int) -> Array:
    names = ("k", "scoring", "normalise", "scale", "groups", "top_groups", "group_score", "bias")
    kernel = Kernel(routing, isa, rows_dim=0, experts=logits.shape[1], **{n: getattr(op, n) for n in names})
    y = Guarded(logits.shape, np.float32)
    kernel([len(logits)], [logits, *([bias] if op.bias else []), y], tasks)
    return y.array


def oracle(op: Routing, logits: Array, bias: Array, dtype: Any) -> Array:
    """Row by row, in float32 for the naive result, in float64 for the truth."""
    x = logits.astype(dtype)
    if op.scoring == "softmax":
        e = np.exp(x - x.max(1, keepdims=True))
        scores = e / e.sum(1, keepdims=True, dtype=dtype)
    else:
        scores = dtype(1) / (dtype(1) + np.exp(-x))
    choice = f64(logits) if op.scoring == "softmax" and not op.bias else f64(scores) + (f64(bias) if op.bias else 0)
    size = x.shape[1] // op.groups
    out = np.zeros_like(x)
    for row, c in enumerate(choice):
        best = {"max": 1, "top2": 2}[op.group_score]
        strength = [np.sort(c[g * size : g * size + size])[-best:].sum() for g in range(op.groups)]
        allowed = np.repeat(np.isin(np.arange(op.groups), np.argsort(strength)[::-1][: op.top_groups]), size)
        chosen = np.argsort(np.where(allowed, -c, np.inf), kind="stable")[: op.k]
        out[row, chosen] = scores[row, chosen]
        if op.normalise:
            out[row] /= out[row].sum(dtype=dtype)
    return np.asarray(out * dtype(op.scale))


@every_isa
@pytest.mark.parametrize("op", ROUTINGS, ids=str)
@pytest.mark.parametrize("experts", [6, 9, 60])
def test_routing(isa: Isa, op: Routing, experts: int) -> None:
    rng = np.random.default_rng(experts)
    logits = (rng.standard_normal((2000 // op.k, experts)) * 2).astype(np.float32)  # 2,000 weights that are not zero
    bias = (rng.standard_normal(experts) * 0.2).astype(np.float32)
    y = route(isa, op, logits, bias, 3)
    truth = oracle(op, logits, bias, np.float64)
    assert ((y != 0) == (truth != 0)).all()
    assert_as_good_as(y, oracle(op, logits, bias, np.float32), truth)
    types = [TensorType(DType.F32, a.shape) for a in (logits, bias)][: 1 + op.bias]
    (reference,) = op.evaluate(types, [f64(logits), f64(bias)][: 1 + op.bias], {})
    np.testing.assert_allclose(reference, truth, rtol=1e-12)
    for tasks in (1, 2, 4):
        assert same_bits(route(isa, op, logits, bias, tasks), y)
    assert same_bits(route(isa, op, logits[-1:], bias, 1)[0], y[-1])


@every_isa
def test_routing_of_ties_and_of_what_is_no_number(isa: Isa) -> None:
    logits = np.array(
        [
            [1.0, 3.0, 3.0, 3.0, 0.0],
            [0.0, np.nan, 1.0, 2.0, 3.0],
            [-np.inf, -np.inf, 5.0, -np.inf, -np.inf],
            [-0.0, 0.0, -0.0, 0.0, -0.0],
        ],
        np.float32,
    )
    y = route(isa, Routing(2, "softmax", True, 1.0), logits, logits[0], 1)
    assert np.flatnonzero(y[0]).tolist() == [1, 2]
    assert y[0, 1] == y[0, 2] == 0.5
    assert np.isnan(y[1]).any(), "a NaN would be lost"
    assert y[2].tolist() == [0, 0, 1, 0, 0]
    assert y[3].tolist() == [0.5, 0.5, 0, 0, 0]
    sigmoid = route(isa, Routing(2, "sigmoid", True, 1.0), np.full((1, 5), -2000, np.float32), logits[0], 1)
    assert (sigmoid == 0).all(), "weights of nothing are nothing"


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


def product(x: Array, w: Array, dtype: Any) -> Array:
    """x wᵀ; in float32 one sum in order."""
    if dtype is np.float64:
        return f64(x) @ f64(w).T
    total = np.zeros((len(x), len(w)), np.float32)
    for i in range(x.shape[1]):
        total += f32(x)[:, i, None] * f32(w)[None, :, i]
    return total


def joined(parts: dict[Any, list[Array]]) -> tuple[Array, Array]:
    """Of all experts, the naive result and the truth."""
    return np.concatenate(parts[np.float32]), np.concatenate(parts[np.float64])


GATINGS = [("silu", "product", 0.0), ("gelu_tanh", "product", 0.0), ("none", "clamped", 0.8)]


@every_isa
@settings(max_examples=4)
@given(
    tokens=tokens_,
    experts=st.integers(3, 9),
    each=st.integers(1, 3),
    hidden=st.sampled_from([1, 15, 33, 64]),
    inner=st.sampled_from([1, 7, 8, 24, 50]),
    dtype=st.sampled_from(sorted(DTYPES)),
    bias=st.booleans(),
    gating=st.sampled_from(GATINGS),
    spread=st.sampled_from([3, 9]),
    tasks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@example(130, 3, 3, 64, 50, "bf16", True, GATINGS[2], 3, 3, 0)
@example(130, 3, 2, 33, 24, "f32", False, GATINGS[0], 3, 2, 0)
def test_products(
    isa: Isa,
    tokens: int,
    experts: int,
    each: int,
    hidden: int,
    inner: int,
    dtype: str,
    bias: bool,
    gating: tuple[str, str, float],
    spread: int,
    tasks: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    many = max(tokens, -(-2000 // (min(hidden, inner) * each)))
    weights = draw_weights(rng, many, experts, each, min(spread, experts))
    mixture = Mixture(rng, experts, hidden, inner, dtype)
    x = rng.standard_normal((many, hidden)).astype(np.float32)
    if isa.bf16_dot and dtype == "bf16":
        x = f32(stored(x, dtype))
    sizes: dict[str, Any] = {"experts": experts, "weight_dtype": dtype, "bias": bias}
    name, how, limit = gating
    first = Kernel(experts_gated_linear, isa, n=inner, k=hidden, activation=name, gating=how, limit=limit, **sizes)
    second = Kernel(experts_linear, isa, n=hidden, k=inner, **sizes)

    def run(these: Array, parts: int) -> tuple[Array, Array, Grouped]:
        grouped = Grouped(weights[these], each)
        rows = np.full((len(these) * each, hidden), np.nan, np.float32)
        rows[: grouped.total] = x[these][grouped.source]
        made = Guarded((len(rows), inner), np.float32)
        extra = [mixture.packed_bias()] if bias else []
        first([7], [rows, grouped.starts, mixture.packed_gate_up(weights[these]), *extra, made], parts)
        y = Guarded((len(rows), hidden), np.float32)
        extra = [mixture.down_bias] if bias else []
        second([7], [made.array, grouped.starts, mixture.packed_down(weights[these]), *extra, y], parts)
        return made.array[: grouped.total], y.array[: grouped.total], grouped

    made, y, grouped = run(np.arange(many), tasks)
    rounded = f32(stored(made, dtype)) if isa.bf16_dot and dtype == "bf16" else made
    found: dict[Any, list[Array]] = {np.float32: [], np.float64: []}
    after: dict[Any, list[Array]] = {np.float32: [], np.float64: []}
    for kind in found:
        for e in range(experts):
            here = slice(grouped.starts[e], grouped.starts[e + 1])
            both = product(x[grouped.source[here]], mixture.gate_up[e], kind)
            found[kind].append(gate(both + (mixture.gate_up_bias[e].astype(kind) if bias else 0), name, how, limit))
            out = product(rounded[here], mixture.down[e], kind)
            after[kind].append(out + (mixture.down_bias[e].astype(kind) if bias else 0))
    assert_as_good_as(made, *joined(found), "gated")
    assert_as_good_as(y, *joined(after), "down")
    # The bits of a token's rows: alone, and in a batch of a few.
    for few in (np.array([many - 1]), np.arange(min(tokens, many))):
        other_made, other, part = run(few, 1)
        for t, row in enumerate(few):
            for a, b in zip(part.places[t], grouped.places[row], strict=True):
                assert a < 0 or (same_bits(other_made[a], made[b]) and same_bits(other[a], y[b]))


class Codes:
    """Codes and scales of experts [experts, n, k]."""

    def __init__(self, rng: np.random.Generator, experts: int, n: int, k: int, bits: int) -> None:
        groups = -(-k // 32)
        self.bits = bits
        self.codes = rng.integers(1 if bits == 8 else 0, 1 << bits, (experts, n, groups * 32), dtype=np.uint8)
        self.scales = ((rng.random((experts, n, groups)) - 0.3) * 0.02).astype(np.float16)

    def packed(self, weights: Array, gated: bool) -> list[Array]:
        """Scales of experts that nobody chose are NaN."""
        scales = self.scales.copy()
        scales[(weights == 0).all(0)] = np.nan

        def rows(w: Array) -> Array:
            return interleave(w[: len(w) // 2], w[len(w) // 2 :]) if gated else w

        codes = np.stack([pack_codes(rows(c), self.bits) for c in self.codes])
        return [codes, np.stack([pack(rows(s)) for s in scales])]

    def product(self, tiles: Tiles, rows: slice, e: int, dtype: Any) -> Array:
        """Integers within groups, `dtype` across them, one group after another."""
        weight = self.codes[e].astype(np.int64).reshape(self.codes.shape[1], -1, 32) - (1 << (self.bits - 1))
        sums = np.einsum("gmi,ngi->gmn", tiles.codes.array[:, rows].astype(np.int64), weight)
        total = np.zeros(sums.shape[1:], dtype)
        for g, part in enumerate(sums):
            scale = self.scales[e][:, g].astype(dtype)[None, :] * tiles.scales.array[g, rows].astype(dtype)[:, None]
            total = total + part.astype(dtype) * scale
        return np.asarray(total)


@every_integer_isa
@settings(max_examples=3)
@given(
    tokens=tokens_,
    experts=st.integers(3, 9),
    each=st.integers(1, 3),
    hidden=st.sampled_from([1, 33, 64]),
    inner=st.sampled_from([1, 8, 33, 50]),
    bits=st.sampled_from([4, 8]),
    bias=st.booleans(),
    gating=st.sampled_from(GATINGS),
    spread=st.sampled_from([3, 9]),
    tasks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@example(130, 3, 3, 64, 50, 4, True, GATINGS[2], 3, 3, 0)
@example(130, 3, 2, 33, 33, 8, False, GATINGS[0], 3, 2, 0)
def test_quantized_products(
    isa: Isa,
    tokens: int,
    experts: int,
    each: int,
    hidden: int,
    inner: int,
    bits: int,
    bias: bool,
    gating: tuple[str, str, float],
    spread: int,
    tasks: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    many = max(tokens, -(-2000 // (min(hidden, inner) * each)))
    weights = draw_weights(rng, many, experts, each, min(spread, experts))
    gate_up, down = Codes(rng, experts, 2 * inner, hidden, bits), Codes(rng, experts, hidden, inner, bits)
    mixture = Mixture(rng, experts, hidden, inner, "f32")
    x = rng.standard_normal((many, hidden)).astype(np.float32)
    sizes: dict[str, Any] = {"rows_dim": 0, "per_token": each, "experts": experts, "bits": bits, "bias": bias}
    name, how, limit = gating
    first = Kernel(
        experts_quantized_gated_linear, isa, n=inner, k=hidden, activation=name, gating=how, limit=limit, **sizes
    )
    second = Kernel(experts_quantized_linear, isa, n=hidden, k=inner, **sizes)

    def run(these: Array, parts: int) -> tuple[Tiles, Tiles, Array, Grouped]:
        grouped = Grouped(weights[these], each)
        rows = np.zeros((len(these) * each, hidden), np.float32)
        rows[: grouped.total] = x[these][grouped.source]
        tiles, made = quantized(rows), Tiles(len(rows), inner)
        tiles.scales.array[:, grouped.total :] = np.nan
        extra = [mixture.packed_bias()] if bias else []
        packed = gate_up.packed(weights[these], True)
        first([len(these)], [*tiles.inputs, grouped.starts, *packed, *extra, *made.outputs], parts)
        y = Guarded((len(rows), hidden), np.float32)
        extra = [mixture.down_bias] if bias else []
        packed = down.packed(weights[these], False)
        second([len(these)], [*made.inputs, grouped.starts, *packed, *extra, y], parts)
        return tiles, made, y.array[: grouped.total], grouped

    tiles, made, y, grouped = run(np.arange(many), tasks)
    used = slice(0, grouped.total)
    found: dict[Any, list[Array]] = {np.float32: [], np.float64: []}
    after: dict[Any, list[Array]] = {np.float32: [], np.float64: []}
    for kind in found:
        for e in range(experts):
            here = slice(grouped.starts[e], grouped.starts[e + 1])
            both = gate_up.product(tiles, here, e, kind)
            found[kind].append(gate(both + (mixture.gate_up_bias[e].astype(kind) if bias else 0), name, how, limit))
            out = down.product(made, here, e, kind)
            after[kind].append(out + (mixture.down_bias[e].astype(kind) if bias else 0))
    assert_as_good_as(y, *joined(after), "down")
    plain, truth = joined(found)
    expected = quantized(plain.astype(np.float32))
    # A rounding in float32 may take a code to its neighbour, not further; where it does, the truth lies between both.
    difference = made.codes.array[:, used].astype(int) - expected.codes.array.astype(int)
    assert np.abs(difference).max(initial=0) <= 1
    back = made.codes.array[:, used] * f64(made.scales.array)[:, used, None]
    wide = back.transpose(1, 0, 2).reshape(grouped.total, -1)[:, :inner]
    step = np.repeat(f64(made.scales.array)[:, used].T, 32, 1)[:, :inner]
    assert (np.abs(wide - truth) <= 0.5001 * step + 1e-5 * np.abs(truth).max()).all()
    for few in (np.array([many - 1]), np.arange(min(tokens, many))):
        _, other_made, other, part = run(few, 1)
        for t, row in enumerate(few):
            for a, b in zip(part.places[t], grouped.places[row], strict=True):
                if a < 0:
                    continue
                assert same_bits(other[a], y[b])
                for one, all_ in zip(other_made.outputs, made.outputs, strict=True):
                    assert same_bits(np.ascontiguousarray(one.array[:, a]), np.ascontiguousarray(all_.array[:, b]))
