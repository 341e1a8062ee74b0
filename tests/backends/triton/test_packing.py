"""The layout of weights: everything that is packed comes back, and lies where the kernels look."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.backends.triton.blocks import block_weight, natural_weight
from llmc.backends.triton.ops import BlockAppend, BlockGatedLinear, BlockLinear
from llmc.backends.triton.packing import (
    from_blocks,
    from_pairs,
    from_words,
    row_order,
    to_blocks,
    to_pairs,
    to_words,
)
from llmc.ir.op import Emitter, run
from llmc.ir.quant import FORMATS
from llmc.ir.types import DType
from tests.backends.triton.nodes import leaf

F32 = DType.F32
OPS = [
    BlockLinear("none", 130, 300, False, "none", False, None, F32, F32),
    BlockGatedLinear("none", 130, 300, "silu", None, F32, F32),
    BlockAppend("none", 300, False, 3, 1, 26, 20, "half", None, F32, F32),
    BlockAppend("none", 300, False, 3, 1, 26, 26, "interleaved", None, F32, F32),
]


@given(st.integers(1, 200), st.integers(1, 300))
def test_blocks_come_back_and_are_filled_up_with_zeros(n: int, k: int) -> None:
    matrix = np.arange(1, n * k + 1).reshape(n, k)
    blocks = to_blocks(matrix)
    assert blocks.shape == (-(-n // 64), -(-k // 128), 64, 128)
    assert np.array_equal(from_blocks(blocks, n, k), matrix)
    assert np.count_nonzero(blocks) == n * k
    row, column = n - 1, k - 1
    assert blocks[row // 64, column // 128, row % 64, column % 128] == matrix[row, column]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_thread_finds_its_codes_of_a_fragment_in_16_bytes(bits: int) -> None:
    """Of 16 columns, the thread t of a row's four multiplies 2t, 2t + 1, 2t + 8 and 2t + 9 (`mma.m16n8k16`)."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, 3, 64, 128)).astype(np.uint8)
    words = to_words(codes, bits)
    assert words.dtype == np.int32 and words.shape == (2, 3 * bits // 4, 64, 16)
    assert np.array_equal(from_words(words, bits), codes)
    pairs, mask = 16 // bits, ((1 << bits) - 1) * 0x00010001
    for thread in range(4):
        own = words.view(np.uint32).reshape(2, 3, bits // 4, 64, 4, 4)[..., thread, :]  # 4 words of each 64 bytes
        for fragment in range(8):
            word, first = divmod(2 * fragment, pairs)
            piece, slab = divmod(word, 4)
            for j in range(2):
                found = own[:, :, piece, :, slab] >> np.uint32(bits * (first + j)) & np.uint32(mask)
                column = 16 * fragment + 8 * j + 2 * thread
                assert np.array_equal(found & 0xFFFF, codes[..., column])
                assert np.array_equal(found >> 16, codes[..., column + 1])


@pytest.mark.parametrize("group", [32, 64, 128])
def test_scales_of_rows_that_a_thread_shares_are_neighbours(group: int) -> None:
    scales = np.arange(1, 71 * 5 + 1).reshape(71, 5).astype(np.float16)
    pairs = to_pairs(scales, group)
    per = 128 // group
    assert pairs.shape == (2, -(-5 // per), 32, per, 2) and np.count_nonzero(pairs) == scales.size
    assert np.array_equal(from_pairs(pairs, 71, 5), scales)
    for row, column in ((0, 0), (9, 3), (23, 4), (70, 2)):
        within = row % 64
        place = within // 16 * 8 + within % 8
        found = pairs[row // 64, column // per, place, column % per, within % 16 // 8]
        assert found == scales[row, column]


def test_rows_of_a_gate_and_of_what_it_gates_take_turns() -> None:
    assert row_order("gated", 6, 0, 0, "half", 0).tolist() == [0, 3, 1, 4, 2, 5]


def test_rows_that_are_rotated_together_are_neighbours() -> None:
    order = row_order("heads", 18, 6, 4, "half", 2).tolist()
    assert order == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17]  # the third head is of values
    assert row_order("heads", 18, 6, 4, "interleaved", 2).tolist() == list(range(18))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("format", ["none", *FORMATS])
def test_what_ops_say_blocks_mean_is_what_was_packed(format: str, op: BlockLinear) -> None:
    made = type(op)(**{**vars(op), "format": format})
    weight = leaf("weight", F32, (made.rows, 300))
    b = Emitter()
    given = weight
    if format != "none":
        codes, scales = b.quantize_weight(weight, format=format)
        given = b.dequantize_weight(codes, scales, format=format, width=300)
    back = natural_weight(b, made, block_weight(b, made, given, F32))
    values = np.random.default_rng(0).standard_normal((made.rows, 300))
    expected, result = run([given, back], {weight: values}, {})
    assert np.array_equal(expected, result)
