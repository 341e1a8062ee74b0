"""8-bit weights: codes 1 to 255 about 128, the largest magnitude of a group at one end. 8.5 bits a weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.ir.quant.format import SCALE_ROUNDING, SCALE_TINY, Array, Floats, QuantFormat


@dataclass(frozen=True)
class EightBit(QuantFormat):
    """weight = (code - 128) · scale, scale = largest magnitude / 127.

    Symmetric: there is no -128, so that a product of two codes and the sum of a pair of them fit in 16 bits.
    """

    @property
    def low(self) -> int:
        return 1 - self.zero

    def choose_scales(self, groups: Floats) -> Floats:
        largest: Floats = np.abs(groups).max(axis=0)
        return largest / np.float32(self.zero - 1)

    def error_bound(self, largest: Array) -> Array:
        """Half a scale, which f16 rounds; a subnormal scale that was rounded down makes codes end before the weights
        do, and one that is zero loses all."""
        steps = self.zero - 1
        bound: Array = largest / (2 * steps) * (1 + 2 * SCALE_ROUNDING) + steps * SCALE_TINY
        return bound


Q8 = EightBit("q8", 8)
