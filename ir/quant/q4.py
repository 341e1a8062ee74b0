"""4-bit weights: codes 0 to 15 about 8, the scale of a group found by search. 4.5 bits a weight in groups of 32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.ir.quant.format import SCALE_ROUNDING, SCALE_TINY, Array, Floats, QuantFormat

STEPS = (*(-n / 4 for n in range(26, 37)), *(n / 4 for n in range(25, 35)))
"""Where the largest magnitude of a group is tried, in units of the scale: -6.5 to -9 and 6.25 to 8.5."""

FINEST, COARSEST = 9.0, 6.0
"""A scale lies between these parts of the largest magnitude."""


@dataclass(frozen=True)
class FourBit(QuantFormat):
    """weight = (code - 8) · scale, of either sign: the code 0, one step further out than 15, may serve either end.

    As in llama.cpp's `make_qx_quants`: for each place of the largest magnitude the codes follow, then by least squares
    the scale from the codes; the scale with the least squared error is taken.
    """

    def choose_scales(self, groups: Floats) -> Floats:
        columns = np.arange(groups.shape[1])
        extreme = groups[np.abs(groups).argmax(axis=0), columns]
        inverse = np.divide(1, extreme, out=np.zeros_like(extreme), where=np.abs(extreme) >= SCALE_TINY)
        best, scales = np.zeros_like(extreme), np.zeros_like(extreme)
        codes, work = np.empty_like(groups), np.empty_like(groups)
        weight = np.abs(groups)  # larger weights matter more: measured on examples/picocode, against 1 and w²
        target = weight * groups
        for step in STEPS:
            np.multiply(groups, inverse * np.float32(step), out=codes)
            np.clip(np.rint(codes, out=codes), self.low, self.zero - 1, out=codes)
            product = np.multiply(codes, target, out=work).sum(axis=0)
            square = np.multiply(np.multiply(codes, codes, out=work), weight, out=work).sum(axis=0)
            scale = np.divide(product, square, out=np.zeros_like(square), where=square > 0)
            gain = product * scale  # of the squared error, over that of zeros
            better = gain > best
            best[better], scales[better] = gain[better], scale[better]
        largest = np.abs(extreme)
        found: Floats = np.copysign(np.clip(np.abs(scales), largest / FINEST, largest / COARSEST), scales)
        return found

    def error_bound(self, largest: Array) -> Array:
        """With the finest scale one end of the codes is 7 of 9 parts away from zero, and the weight at 9."""
        ends = self.zero - 1
        bound: Array = largest * (1 - ends / FINEST * (1 - 2 * SCALE_ROUNDING)) + self.zero * SCALE_TINY
        return bound


Q4 = FourBit("q4", 4)
Q4_G64 = FourBit("q4g64", 4, 64)
Q4_G128 = FourBit("q4g128", 4, 128)
