"""Kernels of a mixture of experts: against float64, with every matrix that nobody chose full of NaN, and bit for bit
whatever a token is batched with and however the work is shared."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.isa import Isa
from llmc.backends.tvm.kernels.experts import combine_experts, group_rows, group_tiles
from llmc.backends.tvm.kernels.linear import experts_gated_linear, experts_linear
from tests.backends.tvm.machine import DTYPES, V3, Array, Guarded, Kernel, f32, f64, needs_v3, same_bits, stored
from tests.backends.tvm.mixtures import GATINGS, Grouped, Mixture, draw_weights, every_isa, gate, joined, tokens_
from tests.backends.tvm.test_quantized import Tiles, quantized
from tests.tolerance import assert_as_good_as


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


@needs_v3
def test_a_token_with_more_weights_than_places_writes_none_beyond_them() -> None:
    weights = np.ones((2, 3), np.float32)
    expected = np.array([[1, 1, 0], [1, 1, 0]], np.float32)
    grouped = Grouped(expected, 2)
    rows, outputs = Guarded((4, 5), np.float32), grouped.outputs()
    x = np.arange(10, dtype=np.float32).reshape(2, 5)
    kernel = Kernel(group_rows, V3, rows_dim=0, experts=3, per_token=2, width=5)
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


def product(x: Array, w: Array, dtype: Any) -> Array:
    """x wᵀ; in float32 one sum in order."""
    if dtype is np.float64:
        return f64(x) @ f64(w).T
    total = np.zeros((len(x), len(w)), np.float32)
    for i in range(x.shape[1]):
        total += f32(x)[:, i, None] * f32(w)[None, :, i]
    return total


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
