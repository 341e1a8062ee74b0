"""The packed layout of weight matrices: panels of 16 output rows, in which a vector lane is a row. Any dtype."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

PANEL = 16
"""Rows of one panel, for every x86 variant: one AVX-512 register of f32, or two AVX2 ones."""
HALF = PANEL // 2


def pack(w: Array) -> Array:
    """[n, k] -> [ceil(n / 16), k, 16], C order; missing rows of the last panel are zero."""
    n, k = w.shape
    panels = -(-n // PANEL)
    packed = np.zeros((panels, k, PANEL), w.dtype)
    full = n // PANEL
    packed[:full] = w[: full * PANEL].reshape(full, PANEL, k).transpose(0, 2, 1)
    if full < panels:
        packed[full, :, : n - full * PANEL] = w[full * PANEL :].T
    return packed


def unpack(packed: Array, n: int) -> Array:
    """[ceil(n / 16), k, 16] -> [n, k]: the inverse of `pack`."""
    panels, k, _ = packed.shape
    return np.ascontiguousarray(packed.transpose(0, 2, 1).reshape(panels * PANEL, k)[:n])


def pack_gated(gate: Array, up: Array) -> Array:
    """Two [n, k] -> [ceil(n / 8), k, 16]: in each panel 8 rows of `gate`, then the same 8 of `up`; zeros at the end."""
    return pack(interleave(gate, up))


def interleave(gate: Array, up: Array) -> Array:
    """Two [n, k] -> [16 · ceil(n / 8), k]: 8 rows of `gate`, the same 8 of `up`, and so on; zeros at the end."""
    n, k = gate.shape
    panels = -(-n // HALF)
    rows = np.zeros((panels, 2, HALF, k), gate.dtype)
    for which, w in enumerate((gate, up)):
        full = n // HALF
        rows[:full, which] = w[: full * HALF].reshape(full, HALF, k)
        if full < panels:
            rows[full, which, : n - full * HALF] = w[full * HALF :]
    return rows.reshape(panels * PANEL, k)


def unpack_gated(packed: Array, n: int) -> tuple[Array, Array]:
    """[ceil(n / 8), k, 16] -> two [n, k]: the inverse of `pack_gated`."""
    return separate(unpack(packed, len(packed) * PANEL), n)


def separate(rows: Array, n: int) -> tuple[Array, Array]:
    """[16 · ceil(n / 8), k] -> two [n, k]: the inverse of `interleave`."""
    halves = rows.reshape(-1, 2, HALF, rows.shape[1])
    gate, up = (np.ascontiguousarray(halves[:, which].reshape(-1, rows.shape[1])[:n]) for which in (0, 1))
    return gate, up


def pack_codes(codes: Array, bits: int) -> Array:
    """u8 [n, K], K a multiple of 32 -> u8 [ceil(n / 16), K / 32, bits, 16, 4]: a lane is a row, with four codes of it.

    Words of four codes follow each other; with 4 bits, word 2i lies in the low halves of bytes and word 2i + 1 in the
    high ones. Missing rows of the last panel are zero.
    """
    n, k = codes.shape
    panels, per_byte = -(-n // PANEL), 8 // bits
    packed = np.zeros((panels, k // 32, bits, PANEL, 4), np.uint8)
    for start in range(0, panels, _PANELS_AT_ONCE):
        part = codes[start * PANEL : (start + _PANELS_AT_ONCE) * PANEL]
        rows = np.zeros((-(-len(part) // PANEL) * PANEL, k), np.uint8)
        rows[: len(part)] = part
        words = rows.reshape(-1, PANEL, k // 32, bits, per_byte, 4)
        for i in range(per_byte):
            packed[start : start + len(words)] |= words[:, :, :, :, i].transpose(0, 2, 3, 1, 4) << (bits * i)
    return packed


def unpack_codes(packed: Array, bits: int, n: int) -> Array:
    """The inverse of `pack_codes`: u8 [n, K]."""
    panels, groups = packed.shape[:2]
    per_byte = 8 // bits
    parts = [(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(per_byte)]
    words = np.stack(parts, axis=3).transpose(0, 4, 1, 2, 3, 5)
    return np.ascontiguousarray(words.reshape(panels * PANEL, groups * 32)[:n])


_PANELS_AT_ONCE = 256
"""How many panels are packed together: it bounds the memory that packing takes."""
