"""The instruction sets that CPU kernels are compiled for: what a maker has to know of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """One instruction set.

    `lanes`: f32 elements of a vector register (divides 16). `row_tile`: rows of activations that a float matrix kernel
    keeps in registers at once; `code_tile`: the same for quantized ones, and `pair_tile` where they take two panels at
    once (0: never). `dot`: how four bytes are multiplied with four and added, see `kernels.dot`. `mcpu` and `features`
    are LLVM's, `gcc_flags` select the same for the C runtime. `machine`: as `uname -m` says.
    `bf16_dot`: whether it multiplies pairs of bf16 elements and adds them to f32 sums, see `kernels.pairs`.
    """

    name: str
    lanes: int
    row_tile: int
    code_tile: int
    pair_tile: int
    dot: str
    mcpu: str
    features: tuple[str, ...]
    gcc_flags: tuple[str, ...]
    machine: str = "x86_64"
    bf16_dot: bool = False

    @property
    def vectors(self) -> int:
        """Registers that one panel of 16 rows fills."""
        return 16 // self.lanes


# Without it LLVM keeps to 256 bits, as some early AVX-512 machines lower their clock.
_WIDE = "-prefer-256-bit"

_V4 = ("-march=x86-64-v4",)
_VNNI, _VNNI_GCC = (_WIDE, "+avx512vnni"), (*_V4, "-mavx512vnni")
_BF16, _BF16_GCC = (*_VNNI, "+avx512bf16"), (*_VNNI_GCC, "-mavx512bf16")

ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("x86-64-v3", 8, 6, 3, 0, "maddubs", "x86-64-v3", (), ("-march=x86-64-v3",)),
        Isa("x86-64-v4", 16, 12, 8, 4, "maddubs", "x86-64-v4", (_WIDE,), _V4),
        Isa("avx512-vnni", 16, 12, 12, 6, "dpbusd", "x86-64-v4", _VNNI, _VNNI_GCC),
        Isa("avx512-bf16", 16, 12, 12, 6, "dpbusd", "x86-64-v4", _BF16, _BF16_GCC, bf16_dot=True),
        Isa(
            "aarch64",
            4,
            4,
            2,
            0,
            "sdot",
            "generic",
            ("+neon", "+fullfp16", "+dotprod"),
            ("-march=armv8.2-a+fp16+dotprod",),
            machine="aarch64",
        ),
    )
}
