"""The layout of weights in memory: blocks of 64 rows and 128 columns, each in one piece, rows in the order in which the
kernel's epilogue wants them. One layout for every architecture and every tile."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

ROWS, COLUMNS = 64, 128
"""Of a block: the smallest tile of rows, and columns in which every format has whole groups and whole words."""


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


def to_words(codes: Array, bits: int) -> Array:
    """Codes u8 [..., 128] of 4 or 8 bits -> i32 [..., 128 · bits / 32], so that shifts and masks give pairs of 16-bit
    numbers: a word holds pairs of neighbours, of pair j the first at bit bits · j and the second 16 bits further up.
    """
    pairs = 16 // bits
    parts = codes.reshape(*codes.shape[:-1], COLUMNS // (2 * pairs), pairs, 2).astype(np.uint32)
    words: Array = (parts << _shifts(bits)).sum((-1, -2), dtype=np.uint32).view(np.int32)
    return words


def from_words(words: Array, bits: int) -> Array:
    """The inverse of `to_words`."""
    parts = words.view(np.uint32)[..., None, None] >> _shifts(bits) & ((1 << bits) - 1)
    return parts.reshape(*words.shape[:-1], COLUMNS).astype(np.uint8)


def _shifts(bits: int) -> Array:
    """[pair, which of it] -> where a code lies in a word."""
    shifts: Array = (bits * np.arange(16 // bits)[:, None] + 16 * np.arange(2)[None, :]).astype(np.uint32)
    return shifts
