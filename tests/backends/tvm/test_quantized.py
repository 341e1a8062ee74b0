"""Integer products, activation quantization and tables of codes, on every instruction set that this machine has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmc.backends.tvm.isa import ISAS, Isa
from llmc.backends.tvm.kernels.embedding import quantized_embedding
from llmc.backends.tvm.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from llmc.backends.tvm.kernels.quantized import quantized_gated_linear, quantized_linear
from llmc.backends.tvm.kernels.rows import best_of_panels
from llmc.backends.tvm.kernels.tiles import quantize_tiles
from llmc.backends.tvm.packing import interleave, pack, pack_codes, separate, unpack_codes
from tests.backends.tvm.machine import Array, Guarded, Kernel, runs_here, same_bits
from tests.backends.tvm.test_linear import activation
from tests.tolerance import assert_as_good_as

# The quantized kernels of an instruction set with products of bf16 are those of the one without.
HERE = [isa for isa in ISAS.values() if runs_here(isa) and not isa.bf16_dot]

every_isa = pytest.mark.parametrize("isa", HERE, ids=lambda isa: isa.name)


class Tiles:
    """Quantized activations in the kernels' layout: outputs of a kernel, or made here."""

    def __init__(self, rows: int, width: int) -> None:
        groups = -(-width // 32)
        self.codes = Guarded((groups, rows, 32), np.int8)
        self.scales = Guarded((groups, rows), np.float32)
        self.offsets = Guarded((groups, rows), np.int32)

    @property
    def outputs(self) -> list[Guarded]:
        return [self.codes, self.scales, self.offsets]

    @property
    def inputs(self) -> list[Array]:
        """As a product reads them: codes in words of four."""
        return [np.ascontiguousarray(self.codes.array).view(np.int32), self.scales.array, self.offsets.array]

    def rows(self, which: slice) -> list[Array]:
        """The same of some of the rows."""
        parts = (self.codes.array[:, which], self.scales.array[:, which], self.offsets.array[:, which])
        codes, scales, offsets = (np.ascontiguousarray(p) for p in parts)
        return [codes.view(np.int32), scales, offsets]


def quantized(x: Array) -> Tiles:
    """As `kernels.tiles` specifies it, in float32 numpy."""
    rows, width = x.shape
    tiles = Tiles(rows, width)
    groups = len(tiles.codes.array)
    padded = np.zeros((rows, groups * 32), np.float32)
    padded[:, :width] = x
    split = padded.reshape(rows, groups, 32)
    peak = np.abs(split).max(2)
    inverse = np.where(peak < np.float32(1e-30), np.float32(0), np.float32(127) / np.maximum(peak, np.float32(1e-30)))
    codes = np.rint(split * inverse[:, :, None].astype(np.float32)).astype(np.int8)
    tiles.codes.array[...] = codes.transpose(1, 0, 2)
    tiles.scales.array[...] = (peak * np.float32(1 / 127)).T
    tiles.offsets.array[...] = -8 * codes.sum(2, dtype=np.int32).T
    return tiles


class Weight:
    """Random codes and scales of [n, k], packed; `groups` is [n, groups, 32] of code - zero."""

    def __init__(self, n: int, k: int, bits: int, rng: np.random.Generator) -> None:
        groups = -(-k // 32)
        # All codes of 4 bits; the format of 8 bits does not use -128.
        self.codes = rng.integers(1 if bits == 8 else 0, 1 << bits, (n, groups * 32), dtype=np.uint8)
        self.scales = ((rng.random((n, groups)) - 0.3) * 0.02).astype(np.float16)
        self.groups = self.codes.astype(np.int64).reshape(n, groups, 32) - (1 << (bits - 1))
        self.bits = bits

    @property
    def packed(self) -> list[Array]:
        return [pack_codes(self.codes, self.bits), pack(self.scales)]


def product(tiles: Tiles, weight: Weight, dtype: Any) -> Array:
    """x wᵀ: integers within groups, `dtype` across them, one group after another."""
    codes = tiles.codes.array.astype(np.int64)
    sums = np.einsum("gmi,ngi->gmn", codes, weight.groups)
    total = np.zeros(sums.shape[1:], dtype)
    for g, part in enumerate(sums):
        scale = weight.scales[:, g].astype(dtype)[None, :] * tiles.scales.array[g].astype(dtype)[:, None]
        total = total + part.astype(dtype) * scale
    return np.asarray(total)


def test_packing_codes_round_trips() -> None:
    rng = np.random.default_rng(0)
    for bits in (4, 8):
        for n in (1, 16, 17, 300 * 16):
            codes = rng.integers(0, 1 << bits, (n, 64), dtype=np.uint8)
            packed = pack_codes(codes, bits)
            assert packed.shape == (-(-n // 16), 2, bits, 16, 4) and same_bits(unpack_codes(packed, bits, n), codes)
    gate, up = (rng.integers(0, 9, (11, 3)) for _ in range(2))
    back = separate(interleave(gate, up), 11)
    assert same_bits(back[0], gate) and same_bits(back[1], up)


@every_isa
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 64), (5, 100), (40, 33)])
def test_quantize_tiles(isa: Isa, rows: int, width: int) -> None:
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((rows, width)) * 10.0 ** rng.integers(-6, 6, (rows, 1))).astype(np.float32)
    x[0, :32] = 0
    x[-1, -1] = 1e-38
    tiles, expected = Tiles(rows, width), quantized(x)
    Kernel(quantize_tiles, isa, rows_dim=3, width=width)([7, 7, 7, rows], [x, *tiles.outputs], tasks=3)
    for given_, wanted in zip(tiles.outputs, expected.outputs, strict=True):
        assert same_bits(given_.array, wanted.array)


@every_isa
def test_ties_go_to_even_and_nan_goes_through(isa: Isa) -> None:
    x = np.zeros((2, 32), np.float32)
    x[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    x[1, 3] = np.nan
    tiles = Tiles(2, 32)
    Kernel(quantize_tiles, isa, rows_dim=0, width=32)([2], [x, *tiles.outputs])
    assert tiles.codes.array[0, 0, :6].tolist() == [127, 0, 2, 2, 0, -2]
    assert tiles.offsets.array[0, 0] == -8 * (127 + 2 + 2 - 2)
    assert np.isnan(tiles.scales.array[0, 1]), "a NaN would be lost"


@every_isa
@settings(max_examples=5)
@given(
    n=st.integers(1, 90),
    k=st.integers(1, 150),
    rows=st.sampled_from([1, 2, 3, 7, 12, 13, 64, 101]),
    bits=st.sampled_from([4, 8]),
    bias=st.booleans(),
    residual=st.booleans(),
    epilogue=st.sampled_from(["none", "silu", "gelu_tanh"]),
    tasks=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 1000),
)
@example(n=1021, k=64, rows=2, bits=4, bias=False, residual=False, epilogue="none", tasks=2, seed=0)
@example(n=33, k=512, rows=13, bits=8, bias=True, residual=True, epilogue="gelu_tanh", tasks=3, seed=0)
def test_quantized_linear(
    isa: Isa, n: int, k: int, rows: int, bits: int, bias: bool, residual: bool, epilogue: str, tasks: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    many = max(rows, -(-2000 // n))
    x = quantized(rng.standard_normal((many, k)).astype(np.float32))
    weight = Weight(n, k, bits, rng)
    b = rng.standard_normal(n).astype(np.float32)
    r = rng.standard_normal((many, n)).astype(np.float32)
    kernel = Kernel(
        quantized_linear, isa, rows_dim=0, n=n, k=k, bits=bits, bias=bias, epilogue=epilogue, residual=residual
    )

    def run(tiles: list[Array], which: slice, tasks: int) -> Array:
        count = tiles[1].shape[1]
        y = Guarded((count, n), np.float32)
        extra = [a for a, wanted in ((b, bias), (r[which], residual)) if wanted]
        kernel([count], [*tiles, *weight.packed, *extra, y], tasks)
        return y.array

    def plain(dtype: Any) -> Array:
        z = product(x, weight, dtype) + (b.astype(dtype) if bias else dtype(0))
        return np.asarray(activation(epilogue, z) + (r.astype(dtype) if residual else dtype(0)))

    y = run(x.inputs, slice(None), tasks)
    assert_as_good_as(y, plain(np.float32), plain(np.float64))
    # The bits of a row: whatever it is batched with, and however the work is shared.
    assert same_bits(run(x.rows(slice(0, rows)), slice(0, rows), tasks), y[:rows])
    assert same_bits(run(x.rows(slice(rows - 1, rows)), slice(rows - 1, rows), 1), y[rows - 1 : rows])


@every_isa
def test_every_number_of_rows(isa: Isa) -> None:
    """Tiles of one panel and of two, odd numbers of panels, several chunks of rows."""
    rng = np.random.default_rng(0)
    x, weight = quantized(rng.standard_normal((200, 32)).astype(np.float32)), Weight(34, 32, 4, rng)
    kernel = Kernel(quantized_linear, isa, rows_dim=0, n=34, k=32, bits=4)
    expected = Guarded((200, 34), np.float32)
    kernel([200], [*x.inputs, *weight.packed, expected])
    assert_as_good_as(expected.array, product(x, weight, np.float32), product(x, weight, np.float64))
    for rows in range(1, 200):
        y = Guarded((rows, 34), np.float32)
        kernel([rows], [*x.rows(slice(0, rows)), *weight.packed, y], tasks=2)
        assert same_bits(y.array, expected.array[:rows]), rows


@every_isa
@settings(max_examples=3)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 100),
    rows=st.sampled_from([1, 2, 13, 50]),
    bits=st.sampled_from([4, 8]),
    tasks=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_quantized_gated_linear(isa: Isa, n: int, k: int, rows: int, bits: int, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    many = max(rows, -(-2000 // n))
    x = quantized(rng.standard_normal((many, k)).astype(np.float32))
    gate, up = (Weight(n, k, bits, rng) for _ in range(2))
    packed = [pack_codes(interleave(gate.codes, up.codes), bits), pack(interleave(gate.scales, up.scales))]
    parameters: dict[str, Any] = {"rows_dim": 0, "n": n, "k": k, "bits": bits, "activation": "silu"}
    y = Guarded((many, n), np.float32)
    Kernel(quantized_gated_linear, isa, **parameters)([many], [*x.inputs, *packed, y], tasks)

    def plain(dtype: Any) -> Array:
        return np.asarray(activation("silu", product(x, gate, dtype)) * product(x, up, dtype))

    assert_as_good_as(y.array, plain(np.float32), plain(np.float64))
    # Quantized in the same launch: what the separate launches give, bit for bit.
    tiles = Tiles(rows, n)
    Kernel(quantized_gated_linear, isa, tiles=True, **parameters)(
        [rows], [*x.rows(slice(0, rows)), *packed, *tiles.outputs], tasks
    )
    for given_, wanted in zip(tiles.outputs, quantized(y.array[:rows]).outputs, strict=True):
        assert same_bits(given_.array, wanted.array)


@every_isa
def test_an_activation_is_quantized_in_its_linear(isa: Isa) -> None:
    rng = np.random.default_rng(0)
    x, weight, b = quantized(rng.standard_normal((14, 40)).astype(np.float32)), Weight(50, 40, 4, rng), np.ones(50, "f")
    parameters: dict[str, Any] = {"rows_dim": 0, "n": 50, "k": 40, "bits": 4, "bias": True, "epilogue": "gelu_tanh"}
    y, tiles = Guarded((14, 50), np.float32), Tiles(14, 50)
    Kernel(quantized_linear, isa, **parameters)([14], [*x.inputs, *weight.packed, b, y])
    Kernel(quantized_linear, isa, tiles=True, **parameters)([14], [*x.inputs, *weight.packed, b, *tiles.outputs], 2)
    for given_, wanted in zip(tiles.outputs, quantized(y.array).outputs, strict=True):
        assert same_bits(given_.array, wanted.array)


@every_isa
@pytest.mark.parametrize("maker", [rms_norm, layer_norm, add_rms_norm, add_layer_norm], ids=lambda m: m.__name__)
@pytest.mark.parametrize("hidden", [64, 100])
def test_norms_quantize_what_they_make(isa: Isa, maker: Any, hidden: int) -> None:
    rng = np.random.default_rng(0)
    vectors = 2 if "layer" in maker.__name__ else 1
    x, r = (rng.standard_normal((5, hidden)).astype(np.float32) for _ in range(2))
    inputs = [x, *([r] if "add" in maker.__name__ else []), *rng.standard_normal((vectors, hidden)).astype(np.float32)]
    sums = [[Guarded((5, hidden), np.float32)] if "add" in maker.__name__ else [] for _ in range(2)]
    y, tiles = Guarded((5, hidden), np.float32), Tiles(5, hidden)
    Kernel(maker, isa, rows_dim=0, hidden=hidden, eps=1e-5)([5], [*inputs, *sums[0], y], tasks=2)
    Kernel(maker, isa, rows_dim=0, hidden=hidden, eps=1e-5, tiles=True)([5], [*inputs, *sums[1], *tiles.outputs])
    for given_, wanted in zip(tiles.outputs, quantized(y.array).outputs, strict=True):
        assert same_bits(given_.array, wanted.array)
    for first, second in zip(*sums, strict=True):
        assert same_bits(first.array, second.array)


@every_isa
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("hidden", [64, 61])
def test_quantized_embedding(isa: Isa, bits: int, hidden: int) -> None:
    table = Weight(50, hidden, bits, np.random.default_rng(0))
    ids = np.array([0, 49, 17, 16, -1, 50], np.int32)
    codes, scales = table.packed
    y = Guarded((6, hidden), np.float32)
    Kernel(quantized_embedding, isa, vocab=50, hidden=hidden, bits=bits)(
        [6], [ids, codes.view(np.int32), scales, y], tasks=2
    )
    rows = (table.groups.astype(np.float32) * table.scales.astype(np.float32)[:, :, None]).reshape(50, -1)
    assert same_bits(y.array, rows[np.clip(ids, 0, 49), :hidden])


@every_isa
@pytest.mark.parametrize("n", [16, 17, 1000])
def test_the_largest_output_is_found_on_the_way(isa: Isa, n: int) -> None:
    rng = np.random.default_rng(n)
    rows = 14
    x, weight = quantized(rng.standard_normal((rows, 40)).astype(np.float32)), Weight(n, 40, 8, rng)
    weight.codes[min(9, n - 1)] = weight.codes[n - 1]  # two equal outputs: the first wins
    weight.scales[min(9, n - 1)] = weight.scales[n - 1]
    x.scales.array[:, 1] = 0  # a row of equal outputs
    x.scales.array[0, 2] = np.nan  # a row of NaN
    panels = -(-n // 16)
    y, keys, greedy = Guarded((rows, n), np.float32), Guarded((rows, panels), np.int64), Guarded((rows,), np.int32)
    Kernel(quantized_linear, isa, rows_dim=3, n=n, k=40, bits=8, best=True)(
        [7, 7, 7, rows], [*x.inputs, *weight.packed, y, keys], tasks=3
    )
    Kernel(best_of_panels, isa, panels=panels)([7, 7, 7, rows], [keys.array, greedy], tasks=2)
    assert np.isnan(y.array[2]).all() and greedy.array[2] == 0
    assert greedy.array[1] == 0
    assert (greedy.array == np.where(np.isnan(y.array), -np.inf, y.array).argmax(1)).all()
