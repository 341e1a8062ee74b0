"""The instruction sets that CPU kernels are compiled for: what a maker has to know of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """One instruction set.

    `lanes`: f32 elements of a vector register (divides 16). `row_tile`: rows of activations that a matrix kernel keeps
    in registers at once. `mcpu` and `features` are LLVM's, `gcc_flags` select the same for the C runtime.
    """

    name: str
    lanes: int
    row_tile: int
    mcpu: str
    features: tuple[str, ...]
    gcc_flags: tuple[str, ...]

    @property
    def vectors(self) -> int:
        """Registers that one panel of 16 rows fills."""
        return 16 // self.lanes


ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("x86-64-v3", 8, 6, "x86-64-v3", (), ("-march=x86-64-v3",)),
        # Without it LLVM keeps to 256 bits, as some early AVX-512 machines lower their clock.
        Isa("x86-64-v4", 16, 12, "x86-64-v4", ("-prefer-256-bit",), ("-march=x86-64-v4",)),
    )
}
