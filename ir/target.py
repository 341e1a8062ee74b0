"""What a target can do: capability data only. Measured figures are a separate input, so that compiles reproduce."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.ir.errors import LlmcError, nearest


@dataclass(frozen=True)
class CpuVariant:
    """One CPU instruction set. `requires`: features by their names in /proc/cpuinfo; `machine`: as `uname -m` says;
    `rounds`: whether its kernels round activations to the dtype of bf16 weights, which must be asked for."""

    name: str
    requires: tuple[str, ...]
    machine: str = "x86_64"
    rounds: bool = False


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c")

CPU_VARIANTS: dict[str, CpuVariant] = {
    v.name: v
    for v in (
        CpuVariant("x86-64-v3", ("avx2", "fma", "f16c", "bmi2")),
        CpuVariant("x86-64-v4", _AVX512),
        CpuVariant("avx512-vnni", (*_AVX512, "avx512_vnni")),
        CpuVariant("avx512-bf16", (*_AVX512, "avx512_vnni", "avx512_bf16"), rounds=True),
        CpuVariant("aarch64", ("asimd", "asimdhp", "asimddp"), "aarch64"),
    )
}
"""What kernels can be compiled for, the best of a machine last."""

PORTABLE = ("x86-64-v3", "x86-64-v4", "avx512-vnni")
"""What `cpu:portable` holds."""


@dataclass(frozen=True)
class Target:
    """What to compile for: a kind of device and the variants that go into one package, best last."""

    kind: str
    variants: tuple[CpuVariant, ...]

    @property
    def machine(self) -> str:
        """The one machine that all variants are for."""
        return self.variants[0].machine


def parse_target(text: str, host_flags: frozenset[str]) -> Target:
    """A target from the command line: `cpu` is the best variant for this machine, `cpu:portable` those of `PORTABLE`,
    or `cpu:x86-64-v3,x86-64-v4`. Raises `LlmcError` naming what is known.

    `avx512-bf16` is only ever chosen by its name: it is faster where weights are bf16 and rows many, but it rounds
    activations to bf16 too, and so loses accuracy that unquantized packages keep otherwise."""
    kind, _, rest = text.partition(":")
    if kind != "cpu":
        raise LlmcError(f"target {text!r}: this version compiles for 'cpu'; known variants: {', '.join(CPU_VARIANTS)}")
    if not rest:
        fitting = [v for v in CPU_VARIANTS.values() if not v.rounds and set(v.requires) <= host_flags]
        if not fitting:
            raise LlmcError(f"target 'cpu': this machine supports none of {', '.join(CPU_VARIANTS)}")
        return Target("cpu", (fitting[-1],))
    if rest == "portable":
        return Target("cpu", tuple(CPU_VARIANTS[name] for name in PORTABLE))
    chosen = []
    for name in rest.split(","):
        if name not in CPU_VARIANTS:
            raise LlmcError(f"target {text!r}: unknown variant {name!r}; {nearest(name, CPU_VARIANTS)}")
        chosen.append(CPU_VARIANTS[name])
    if len({v.machine for v in chosen}) > 1:
        raise LlmcError(f"target {text!r}: one package is for one kind of machine; compile for aarch64 by itself")
    return Target("cpu", tuple(dict.fromkeys(chosen)))
