"""8-bit floats as weights: codes are bit patterns of f8e4m3, one scale for 128 of them. 8.125 bits a weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.ir.quant.format import SCALE_ROUNDING, SCALE_TINY, Array, Floats, QuantFormat
from llmc.ir.types import F8E4M3_LARGEST, DType

_VALUES: Floats = np.arange(256, dtype=np.uint8).view(DType.F8E4M3.numpy).astype(np.float32)
"""What each bit pattern says; 0x7F and 0xFF are NaN, and are never made."""

_NEGATIVE_ZERO = 0x80

_HALF_STEP = 16.0
"""Half the distance between neighbours among the largest numbers, 256 to 448."""


@dataclass(frozen=True)
class Float8(QuantFormat):
    """weight = f8e4m3(code) · scale, the scale 1/448 of the largest magnitude, so that this is the largest number.

    A weight keeps 4 bits, its own magnitude deciding their place: small weights of a group keep as many as large ones.
    """

    @property
    def kind(self) -> str:
        return "e4m3"

    @property
    def zero(self) -> int:
        """+0; there is no -0."""
        return 0

    def choose_scales(self, groups: Floats) -> Floats:
        scales: Floats = np.abs(groups).max(axis=0) / np.float32(F8E4M3_LARGEST)
        return scales

    def encode(self, values: Floats) -> Array:
        codes: Array = DType.F8E4M3.store(values).view(np.uint8)
        codes[codes == _NEGATIVE_ZERO] = self.zero
        return codes

    def decode(self, codes: Array) -> Floats:
        values: Floats = _VALUES[codes]
        return values

    def error_bound(self, largest: Array) -> Array:
        """Half a step of the largest numbers, with the scale as f16 rounds it; a subnormal scale that was rounded down
        makes the numbers end before the weights do, and one that is zero loses all."""
        bound: Array = largest / F8E4M3_LARGEST * _HALF_STEP * (1 + 2 * SCALE_ROUNDING) + F8E4M3_LARGEST * SCALE_TINY
        return bound


FP8 = Float8("fp8", 8, 128)
