"""Integer products of experts: against float64, scales that nobody chose NaN, bit for bit in any batch."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.isa import Isa
from llmc.backends.tvm.kernels.quantized import experts_quantized_gated_linear, experts_quantized_linear
from llmc.backends.tvm.packing import interleave, pack, pack_codes
from tests.backends.tvm.machine import Array, Guarded, Kernel, f64, same_bits
from tests.backends.tvm.mixtures import (
    GATINGS,
    Grouped,
    Mixture,
    draw_weights,
    every_integer_isa,
    gate,
    joined,
    tokens_,
)
from tests.backends.tvm.test_quantized import Tiles, quantized
from tests.tolerance import assert_as_good_as


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
