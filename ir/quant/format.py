"""What a weight format is: groups of codes with one scale each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llmc.ir.errors import LlmcError

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]

BLOCK = 1 << 18
"""Weights that are quantized at a time: few enough for the temporary arrays to stay in a cache."""

INTEGER_GROUP = 32
"""The group in which activations are quantized for products of integers."""

SCALE_ROUNDING = 2.0**-11
"""Largest relative error of a normal f16 scale."""

SCALE_TINY = 2.0**-25
"""Largest absolute error of a subnormal f16 scale; below it a scale is zero."""


@dataclass(frozen=True)
class QuantFormat(ABC):
    """Weights as codes of `bits` bits, in groups of `group` along a row, with one f16 scale a group: weight =
    value(code) · scale. A row's partial last group is filled up with the code `zero`, whose value is 0.

    A code's value is code - zero where `kind` is "integer"; where it is "e4m3", the f8e4m3 number of those bits. A
    subclass chooses the scales, and the smallest code.
    """

    name: str
    bits: int
    group: int = 32

    @property
    def kind(self) -> str:
        """What a code stands for: "integer" or "e4m3"."""
        return "integer"

    @property
    def integer_products(self) -> bool:
        """Whether activations in 8 bits are multiplied with the codes as integers, which is what CPU kernels do: these
        quantize activations in groups of `INTEGER_GROUP`."""
        return self.kind == "integer" and self.group == INTEGER_GROUP

    @property
    def zero(self) -> int:
        """The code that means 0."""
        return int(1 << (self.bits - 1))

    @property
    def low(self) -> int:
        """The smallest value of an integer code; the largest is zero - 1."""
        return -self.zero

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight takes, its part of the scale included."""
        return self.bits + 16 / self.group

    def padded(self, width: int) -> int:
        """Codes in a row of `width` weights: the next multiple of the group."""
        return -(-width // self.group) * self.group

    @abstractmethod
    def choose_scales(self, groups: Floats) -> Floats:
        """A scale f32 [g] for each column of groups f32 [group, g] (finite), before it is rounded to f16."""

    @abstractmethod
    def error_bound(self, largest: Array) -> Array:
        """The largest |weight - dequantized| in a group whose largest magnitude is `largest`."""

    def quantize(self, weights: Array) -> tuple[Array, Array]:
        """Weights [n, k] of any float dtype -> codes u8 [n, K], scales f16 [n, K / group], K = `padded(k)`.

        A group whose scale rounds to zero in f16 has the scale 0 and the code `zero` throughout.
        Raises `LlmcError` for weights that are not finite, or so large that a scale exceeds f16's 65504.
        """
        rows, width = weights.shape
        padded = self.padded(width)
        codes = np.full((rows, padded), self.zero, np.uint8)
        scales = np.zeros((rows, padded // self.group), np.float16)
        step = max(1, BLOCK // max(1, padded))
        for start in range(0, rows, step):
            block = np.zeros((min(step, rows - start), padded), np.float32)
            with np.errstate(over="ignore"):  # what float32 cannot hold is reported below
                block[:, :width] = weights[start : start + step]
            if not np.isfinite(block).all():
                row, column = np.argwhere(~np.isfinite(block))[0]
                raise LlmcError(
                    f"the weight [{row + start}, {column}] is {weights[row + start, column]}; {self.name} takes finite"
                    " numbers only"
                )
            codes[start : start + step], scales[start : start + step] = self._quantize(block)
        return codes, scales

    def _quantize(self, block: Floats) -> tuple[Array, Array]:
        """`quantize` for a few whole rows f32 [n, K]."""
        groups = np.ascontiguousarray(block.reshape(-1, self.group).T)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            scales = self.choose_scales(groups).astype(np.float16)
        if not np.isfinite(scales).all():
            largest = np.abs(block).max()
            raise LlmcError(
                f"a weight of magnitude {largest:.6g} needs a scale above 65504, the largest that f16 holds"
            )
        scales[scales == 0] = 0  # no negative zero
        divisor = np.where(scales == 0, np.float32(np.inf), scales.astype(np.float32))
        groups /= divisor
        codes = self.encode(groups).T.reshape(block.shape)
        return codes, scales.reshape(len(block), -1)

    def encode(self, values: Floats) -> Array:
        """The codes u8 whose values are nearest to values f32, which may be overwritten; beyond the largest: that."""
        np.clip(np.rint(values, out=values), self.low, self.zero - 1, out=values)
        values += self.zero
        return values.astype(np.uint8)

    def decode(self, codes: Array) -> Floats:
        """The values f32 of codes."""
        values = codes.astype(np.float32)
        values -= self.zero
        return values

    def dequantize(self, codes: Array, scales: Array, width: int) -> Floats:
        """Codes [n, K], scales [n, K / group] -> weights f32 [n, width]; exact, for a product takes 19 bits at most."""
        weights = self.decode(codes).reshape(*scales.shape, self.group)
        weights *= np.asarray(scales, np.float32)[:, :, None]
        return weights.reshape(codes.shape)[:, :width]

    def pack(self, codes: Array) -> Array:
        """Codes u8 [n, K] at `bits` bits each: u8 [n, K · bits / 8]. Of two 4-bit codes the first is the low nibble."""
        if self.bits == 8:
            return codes
        assert self.bits == 4, f"no packing for {self.bits} bits"
        packed: Array = codes[:, 0::2] | codes[:, 1::2] << 4
        return packed

    def unpack(self, packed: Array) -> Array:
        """The inverse of `pack`: u8 [n, K]."""
        if self.bits == 8:
            return packed
        return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), 2 * packed.shape[1])
