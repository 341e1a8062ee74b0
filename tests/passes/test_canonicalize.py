"""Casts in a row: the first goes only where it loses nothing."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from llmc.ir.builder import Builder
from llmc.ir.op import Array
from llmc.ir.types import DType
from llmc.passes.base import PassContext
from llmc.passes.canonicalize import Canonicalize

FLOATS = [d for d in DType if d.is_float]


def values(dtype: DType) -> Array:
    """Numbers of a dtype: all bit patterns of an 8-bit float; else magnitudes and lengths that tell it from others."""
    if dtype is DType.F8E4M3:
        return np.arange(256, dtype=np.uint8).view(dtype.numpy).astype(np.float64)
    with np.errstate(over="ignore"):
        return dtype.store(np.array([1 + 2.0**-p for p in range(53)] + [2.0**e for e in (-100, 15, 100, 1000)]))


@pytest.mark.parametrize(("narrow", "wide"), [p for p in product(FLOATS, FLOATS) if p[0] is not p[1]], ids=str)
def test_a_cast_and_another(narrow: DType, wide: DType) -> None:
    given = values(narrow).astype(np.float64)
    with np.errstate(over="ignore"):
        through = wide.store(given).astype(np.float64)
    b = Builder()
    x = b.input("x", narrow, (given.size,))
    last = next(d for d in (DType.F32, DType.BF16, DType.F16) if d not in (narrow, wide))
    graph = b.graph({"y": b.cast(b.cast(x, dtype=wide), dtype=last)})
    kept = len(Canonicalize().run(graph, PassContext()).nodes)
    assert kept == (1 if np.array_equal(given, through, equal_nan=True) else 2)
