"""When a kernel's result is right: its error is at most twice that of a plain implementation in the same dtypes.

The truth is a float64 reference. The plain implementation is numpy: operands rounded to their storage dtype, float32
arithmetic, no tricks. Both errors are taken as the largest over the whole result. A plain implementation is at times
exact by luck (one element, a power of two), so an error of one rounding of the largest value is always allowed: no
float32 result can promise less. And the largest of a few errors is luck on either side: judge thousands of results.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDING = float(np.finfo(np.float32).eps)


def max_error(value: NDArray[Any], truth: NDArray[Any]) -> float:
    """The largest |value - truth|; infinite where `value` is not finite and `truth` is."""
    difference = np.abs(value.astype(np.float64) - truth)
    return float(np.where(np.isfinite(value.astype(np.float64)), difference, np.inf).max(initial=0.0))


def assert_as_good_as(value: NDArray[Any], naive: NDArray[Any], truth: NDArray[Any], what: str = "result") -> None:
    """`value` errs at most twice as much as `naive` does, both against `truth` (float64), all of one shape."""
    assert value.shape == naive.shape == truth.shape, f"{what}: shapes {value.shape}, {naive.shape}, {truth.shape}"
    assert np.isfinite(truth).all(), f"{what}: the reference is not finite"
    error, allowed = max_error(value, truth), 2 * max_error(naive, truth)
    floor = ROUNDING * float(np.abs(truth).max(initial=0.0))
    assert error <= max(allowed, floor), (
        f"{what}: error {error:.3g}, twice the naive error is {allowed:.3g} (floor {floor:.3g})"
    )
