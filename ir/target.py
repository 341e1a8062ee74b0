"""What a target can do: capability data only. Measured figures are a separate input, so that compiles reproduce."""

from __future__ import annotations

from dataclasses import dataclass

from llmc.ir.errors import LlmcError, nearest


@dataclass(frozen=True)
class CpuVariant:
    """One CPU instruction set: `lanes` is the f32 vector width, `requires` the /proc/cpuinfo flags."""

    name: str
    lanes: int
    llvm_cpu: str
    requires: tuple[str, ...]


CPU_VARIANTS: dict[str, CpuVariant] = {
    v.name: v
    for v in (
        CpuVariant("x86-64-v3", 8, "x86-64-v3", ("avx2", "fma", "f16c", "bmi2")),
        CpuVariant("x86-64-v4", 16, "x86-64-v4", ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c")),
    )
}


@dataclass(frozen=True)
class Target:
    """What to compile for: a kind of device and the variants that go into one package, best last."""

    kind: str
    variants: tuple[CpuVariant, ...]


def parse_target(text: str, host_flags: frozenset[str]) -> Target:
    """A target from the command line: `cpu` is the best variant for this machine, `cpu:portable` all of them, or
    `cpu:x86-64-v3,x86-64-v4`. Raises `LlmcError` naming what is known."""
    kind, _, rest = text.partition(":")
    if kind != "cpu":
        raise LlmcError(f"target {text!r}: this version compiles for 'cpu'; known variants: {', '.join(CPU_VARIANTS)}")
    if not rest:
        fitting = [v for v in CPU_VARIANTS.values() if set(v.requires) <= host_flags]
        if not fitting:
            raise LlmcError(f"target 'cpu': this machine supports none of {', '.join(CPU_VARIANTS)}")
        return Target("cpu", (fitting[-1],))
    if rest == "portable":
        return Target("cpu", tuple(CPU_VARIANTS.values()))
    chosen = []
    for name in rest.split(","):
        if name not in CPU_VARIANTS:
            raise LlmcError(f"target {text!r}: unknown variant {name!r}; {nearest(name, CPU_VARIANTS)}")
        chosen.append(CPU_VARIANTS[name])
    return Target("cpu", tuple(dict.fromkeys(chosen)))
