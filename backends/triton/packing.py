"""The layout of weights in memory: blocks of 64 rows and 128 columns, each in one piece, rows in the order in which the
kernel's epilogue wants them. One layout for every architecture and every tile."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

ROWS, COLUMNS = 64, 128
"""Of a block: the smallest tile of rows, and columns in which every format has whole groups and whole words."""

WORD_BYTES = 64
"""Of a row of words: 16 bytes for each of 4 threads."""


def blocks_of(size: int, block: int) -> int:
    """Blocks that hold `size` rows or columns."""
    return -(-size // block)


def row_order(order: str, rows: int, head_dim: int, rotary_dim: int, layout: str, turned_heads: int) -> Array:
    """Which row of the weight each packed row is, i64 [rows].

    `natural`: its own. `gated`: of [gate; up], a row of each in turns. `heads`: in each of the first `turned_heads`
    heads, the two rows that are rotated together next to each other, then what is not rotated.
    """
    if order == "natural":
        return np.arange(rows)
    if order == "gated":
        return np.arange(rows).reshape(2, rows // 2).T.reshape(-1)
    assert order == "heads"
    within = np.arange(head_dim)
    if layout == "half":
        within[:rotary_dim] = np.arange(rotary_dim).reshape(2, rotary_dim // 2).T.reshape(-1)
    heads = np.arange(rows).reshape(-1, head_dim)
    heads[:turned_heads] = heads[:turned_heads, within]
    return heads.reshape(-1)


def to_blocks(matrix: Array) -> Array:
    """[n, k] -> [ceil(n / 64), ceil(k / 128), 64, 128]; what is missing is zero."""
    n, k = matrix.shape
    high, wide = blocks_of(n, ROWS), blocks_of(k, COLUMNS)
    padded = np.zeros((high * ROWS, wide * COLUMNS), matrix.dtype)
    padded[:n, :k] = matrix
    return np.ascontiguousarray(padded.reshape(high, ROWS, wide, COLUMNS).transpose(0, 2, 1, 3))


def from_blocks(blocks: Array, n: int, k: int) -> Array:
    """The inverse of `to_blocks`."""
    high, wide, *_ = blocks.shape
    padded = blocks.transpose(0, 2, 1, 3).reshape(high * ROWS, wide * COLUMNS)
    return np.ascontiguousarray(padded[:n, :k])


def to_words(blocks: Array, bits: int) -> Array:
    """Codes u8 [high, wide, 64, 128] of 4 or 8 bits -> words i32 [high, wide · bits / 4, 64, 16].

    A row of 16 words is what the 4 threads that share a row of a matrix unit's operand hold, 4 words each, so that a
    thread loads 16 bytes which it multiplies itself (NVIDIA, PTX ISA, "Matrix Fragments for mma.m16n8k16"). The word
    4t + s holds, of slab s of 128 / bits columns, the pairs 8j + 2t and 8j + 2t + 1 at the bits bits · j and 16 more.
    """
    high, wide, *_ = blocks.shape
    pairs, pieces = 16 // bits, bits // 4
    parts = blocks.reshape(high, wide, ROWS, pieces, 4, pairs, 4, 2)
    words = np.zeros((high, wide, pieces, ROWS, 4, 4), np.uint32)
    for j in range(pairs):
        for upper in range(2):
            codes = parts[..., j, :, upper].transpose(0, 1, 3, 2, 5, 4).astype(np.uint32)
            words |= codes << np.uint32(bits * j + 16 * upper)
    return words.view(np.int32).reshape(high, wide * pieces, ROWS, 16)


def from_words(words: Array, bits: int) -> Array:
    """The inverse of `to_words`."""
    high, wide, *_ = words.shape
    pairs, pieces = 16 // bits, bits // 4
    parts = np.empty((high, wide // pieces, ROWS, pieces, 4, pairs, 4, 2), np.uint8)
    found = words.view(np.uint32).reshape(high, wide // pieces, pieces, ROWS, 4, 4).transpose(0, 1, 3, 2, 5, 4)
    for j in range(pairs):
        for upper in range(2):
            parts[..., j, :, upper] = found >> np.uint32(bits * j + 16 * upper) & np.uint32((1 << bits) - 1)
    return parts.reshape(high, wide // pieces, ROWS, COLUMNS)


def to_pairs(scales: Array, group: int) -> Array:
    """Scales [n, groups] -> [ceil(n / 64), ceil(columns / 128), 32, 128 / group, 2], zeros where there are none: those
    of the rows 16a + b and 16a + 8 + b, which one thread multiplies, side by side at 8a + b."""
    n, groups = scales.shape
    per = COLUMNS // group
    high, wide = blocks_of(n, ROWS), blocks_of(groups, per)
    padded = np.zeros((high * ROWS, wide * per), scales.dtype)
    padded[:n, :groups] = scales
    parts = padded.reshape(high, 4, 2, 8, wide, per)
    return np.ascontiguousarray(parts.transpose(0, 4, 1, 3, 5, 2)).reshape(high, wide, ROWS // 2, per, 2)


def from_pairs(pairs: Array, n: int, groups: int) -> Array:
    """The inverse of `to_pairs`."""
    high, wide, _, per, _ = pairs.shape
    parts = pairs.reshape(high, wide, 4, 8, per, 2).transpose(0, 2, 5, 3, 1, 4)
    return np.ascontiguousarray(parts.reshape(high * ROWS, wide * per)[:n, :groups])
