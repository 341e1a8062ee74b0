"""8-bit weights: codes 1 to 255 about 128, the scale of a group found by search. 8.5 bits a weight in groups of 32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.ir.quant.format import SCALE_ROUNDING, SCALE_TINY, Array, Floats, QuantFormat

STEPS = tuple(127 - n / 2 for n in range(9))
"""Where the largest magnitude of a group is tried, in units of the scale. The whole numbers are among them, so that
weights which came from codes get their codes again."""


@dataclass(frozen=True)
class EightBit(QuantFormat):
    """weight = (code - 128) · scale, the scale 1/127 to 1/123 of the largest magnitude.

    Symmetric: there is no -128, so that a product of two codes and the sum of a pair of them fit in 16 bits. A slightly
    larger scale rounds every weight of the group anew, and the squared error of 32 roundings varies by a sixth: the
    best of nine loses a sixth less than the first, for nothing but time at compile (less in larger groups, whose error
    varies less).
    """

    @property
    def low(self) -> int:
        return 1 - self.zero

    def choose_scales(self, groups: Floats) -> Floats:
        largest: Floats = np.abs(groups).max(axis=0)
        best = np.full_like(largest, np.inf)
        scales = np.zeros_like(largest)
        work = np.empty_like(groups)
        for step in STEPS:
            scale = (largest / np.float32(step)).astype(np.float16).astype(np.float32)
            inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
            np.rint(np.multiply(groups, inverse, out=work), out=work)
            np.clip(work, self.low, -self.low, out=work)  # the rounded scale may be too small
            np.subtract(np.multiply(work, scale, out=work), groups, out=work)
            error = np.einsum("ig,ig->g", work, work)
            better = error < best
            best[better], scales[better] = error[better], scale[better]
        return np.where(np.isfinite(best), scales, largest / np.float32(STEPS[0]))

    def error_bound(self, largest: Array) -> Array:
        """Half a scale, which f16 rounds; a subnormal scale that was rounded down makes codes end before the weights
        do, and one that is zero loses all."""
        bound: Array = largest / (2 * STEPS[-1]) * (1 + 2 * SCALE_ROUNDING) + (self.zero - 1) * SCALE_TINY
        return bound


Q8 = EightBit("q8", 8)
Q8_G128 = EightBit("q8g128", 8, 128)
