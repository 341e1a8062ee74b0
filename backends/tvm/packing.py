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
    n, k = gate.shape
    panels = -(-n // HALF)
    rows = np.zeros((panels, 2, HALF, k), gate.dtype)
    for which, w in enumerate((gate, up)):
        full = n // HALF
        rows[:full, which] = w[: full * HALF].reshape(full, HALF, k)
        if full < panels:
            rows[full, which, : n - full * HALF] = w[full * HALF :]
    return pack(rows.reshape(panels * PANEL, k))


def unpack_gated(packed: Array, n: int) -> tuple[Array, Array]:
    """[ceil(n / 8), k, 16] -> two [n, k]: the inverse of `pack_gated`."""
    panels, k, _ = packed.shape
    rows = unpack(packed, panels * PANEL).reshape(panels, 2, HALF, k)
    gate, up = (np.ascontiguousarray(rows[:, which].reshape(panels * HALF, k)[:n]) for which in (0, 1))
    return gate, up
