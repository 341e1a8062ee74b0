"""Products of stored codes with quantized activations, four bytes at a time, exact in integers.

A lane holds four codes of one row of weights; the activations' four codes (-127 to 127) are the same in every lane. A
weight is `code - zero`; instructions that take an unsigned operand are given the code itself, and `zero` times the sum
of the activations' codes is subtracted, once for each group of 32: that is a shift of the group's offset, which is -8
times that sum.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from llmc.backends.tvm.kernels.vector import i32, intrinsic, splat, wide


class Dot:
    """Sums of one group. `kind` is the dtype of a running sum, `width` how many of them a vector register has."""

    kind = "int32"

    def __init__(self, bits: int, lanes: int) -> None:
        self.lanes = lanes
        self.width = lanes
        self.bits = bits

    def correction(self, offset):
        """-zero times the sum of the group's activation codes; zero is 2^(bits - 1)."""
        if self.bits == 4:
            return offset
        shift = T.shift_left if self.bits > 4 else T.shift_right
        return shift(offset, i32(abs(self.bits - 4), self.lanes))

    def start(self, offset):
        """The sum before the first word; `offset` is the group's, in every lane."""
        return self.correction(offset)

    def step(self, running, codes, word):
        """`running` and the products of one word: codes u8 [4 · lanes], word i32 [lanes]."""
        raise NotImplementedError

    def finish(self, running, offset):
        """The group's sum, i32 [lanes]."""
        return running


class _Dpbusd(Dot):
    """AVX-512 VNNI: 16 sums of four products in one instruction."""

    def step(self, running, codes, word):
        return intrinsic(
            "llvm.x86.avx512.vpdpbusd.512",
            running,
            codes,
            T.reinterpret(wide("int8", 4 * self.lanes), word),
            dtype=wide("int32", self.lanes),
        )


class _MaddNarrow(Dot):
    """Codes of at most 4 bits: 16-bit sums hold a whole group, 8 · 2 · 15 · 127 < 2^15, and are widened once."""

    kind = "int16"

    def __init__(self, bits: int, lanes: int) -> None:
        super().__init__(bits, lanes)
        self.width = 2 * lanes

    def start(self, offset):
        return _i16(0, self.width)

    def step(self, running, codes, word):
        return running + _maddubs(codes, T.reinterpret(wide("int8", 4 * self.lanes), word), self.lanes)

    def finish(self, running, offset):
        return _widen(running, self.lanes) + self.correction(offset)


class _MaddWide(Dot):
    """Codes of 8 bits would overflow 16-bit sums: |activation| · (weight with its sign) stays below 2 · 127 · 127."""

    def start(self, offset):
        return i32(0, self.lanes)

    def step(self, running, codes, word):
        n = 4 * self.lanes
        x = T.reinterpret(wide("int8", n), word)
        signed = T.reinterpret(
            wide("int8", n), T.bitwise_xor(codes, splat(tirx.IntImm("uint8", 1 << (self.bits - 1)), n))
        )
        zero = splat(tirx.IntImm("int8", 0), n)
        negative = x < zero
        magnitude = T.reinterpret(wide("uint8", n), T.Select(negative, zero - x, x))
        return running + _widen(_maddubs(magnitude, T.Select(negative, zero - signed, signed), self.lanes), self.lanes)


class _Sdot(Dot):
    """ARM's dot product of signed bytes: a weight is its code less zero, so there is nothing to correct."""

    def start(self, offset):
        return i32(0, self.lanes)

    def step(self, running, codes, word):
        n = 4 * self.lanes
        signed = T.reinterpret(wide("int8", n), codes - splat(tirx.IntImm("uint8", 1 << (self.bits - 1)), n))
        x = T.reinterpret(wide("int8", n), word)
        return intrinsic("llvm.aarch64.neon.sdot", running, signed, x, dtype=wide("int32", self.lanes))


def dot_of(isa, bits):
    """The best that an instruction set has for codes of so many bits."""
    if isa.dot in ("dpbusd", "sdot"):
        return (_Dpbusd if isa.dot == "dpbusd" else _Sdot)(bits, isa.lanes)
    return (_MaddNarrow if bits <= 4 else _MaddWide)(bits, isa.lanes)


def _i16(value, lanes):
    return splat(tirx.IntImm("int16", value), lanes)


def _maddubs(unsigned, signed, lanes):
    """Sums of two neighbouring products, i16 [2 · lanes]; the caller's operands cannot overflow them."""
    name = "llvm.x86.avx512.pmaddubs.w.512" if lanes == 16 else "llvm.x86.avx2.pmadd.ub.sw"
    return intrinsic(name, unsigned, signed, dtype=wide("int16", 2 * lanes))


def _widen(pairs, lanes):
    """Sums of two neighbours of i16 [2 · lanes], i32 [lanes]."""
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == 16 else "llvm.x86.avx2.pmadd.wd"
    return intrinsic(name, pairs, _i16(1, 2 * lanes), dtype=wide("int32", lanes))
