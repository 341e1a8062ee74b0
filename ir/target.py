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
class GpuVariant:
    """One NVIDIA architecture, and the sizes of the chip that kernels are shaped for.

    `shared_bytes`: of shared memory that one block may have; `multiprocessors`, `bandwidth` (bytes/s of memory) and
    `issue_rate` (instructions of one thread per second, all threads together: multiprocessors · 4 schedulers · 32
    lanes · clock) are the datasheet's of `chip`, the largest in use: what tiles and budgets are reckoned with, never
    what is reported as measured.
    """

    name: str
    capability: tuple[int, int]
    chip: str
    multiprocessors: int
    shared_bytes: int
    bandwidth: float
    clock: float
    machine: str = "x86_64"

    @property
    def issue_rate(self) -> float:
        """Instructions of one thread per second."""
        return self.multiprocessors * 4 * 32 * self.clock

    @property
    def has_fp8(self) -> bool:
        """Whether it converts 8-bit floats: from Ada on."""
        return self.capability >= (8, 9)

    @property
    def exact(self) -> bool:
        """Whether its code runs on this very architecture alone, and its PTX as well: Triton uses what only the targets
        sm_90a and sm_100a have (PTX ISA, `.target`)."""
        return self.capability >= (9, 0)

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel may start before its predecessor ends, and wait inside: from Hopper on."""
        return self.capability >= (9, 0)


GPU_VARIANTS: dict[str, GpuVariant] = {
    v.name: v
    for v in (
        GpuVariant("sm_80", (8, 0), "A100 80GB", 108, 163 << 10, 2.0e12, 1.41e9),
        GpuVariant("sm_86", (8, 6), "A40", 84, 99 << 10, 0.7e12, 1.74e9),
        GpuVariant("sm_89", (8, 9), "L40S", 142, 99 << 10, 0.86e12, 2.52e9),
        GpuVariant("sm_90", (9, 0), "H200", 132, 227 << 10, 4.8e12, 1.98e9),
        GpuVariant("sm_100", (10, 0), "B200", 148, 227 << 10, 8.0e12, 1.96e9),
    )
}
"""What GPU kernels can be compiled for."""


@dataclass(frozen=True)
class Target:
    """What to compile for: a kind of device (`cpu`, `cuda`) and the variants that go into one package, best last."""

    kind: str
    variants: tuple[CpuVariant, ...] | tuple[GpuVariant, ...]

    @property
    def machine(self) -> str:
        """The one machine that all variants are for."""
        return self.variants[0].machine

    @property
    def rounds(self) -> bool:
        """Whether kernels round activations to 16 bits, where weights have no more."""
        return self.kind == "cuda" or any(v.rounds for v in self.cpu_variants)

    @property
    def cpu_variants(self) -> tuple[CpuVariant, ...]:
        """The variants of a CPU; none on a GPU."""
        return tuple(v for v in self.variants if isinstance(v, CpuVariant))

    @property
    def gpu_variants(self) -> tuple[GpuVariant, ...]:
        """The variants of a GPU; none on a CPU."""
        return tuple(v for v in self.variants if isinstance(v, GpuVariant))


def parse_target(text: str, host_flags: frozenset[str]) -> Target:
    """A target from the command line: `cpu` is the best variant for this machine, `cpu:portable` those of `PORTABLE`,
    or `cpu:x86-64-v3,x86-64-v4`, or `cuda:sm_80,sm_90`. Raises `LlmcError` naming what is known.

    `avx512-bf16` is only ever chosen by its name: it is faster where weights are bf16 and rows many, but it rounds
    activations to bf16 too, and so loses accuracy that unquantized packages keep otherwise."""
    kind, _, rest = text.partition(":")
    if kind == "cuda":
        return _parse_cuda(text, rest)
    if kind != "cpu":
        raise LlmcError(
            f"target {text!r}: expected 'cpu', 'cpu:VARIANT,…' with variants of {', '.join(CPU_VARIANTS)},"
            f" or 'cuda:ARCHITECTURE,…' with architectures of {', '.join(GPU_VARIANTS)}"
        )
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


def _parse_cuda(text: str, rest: str) -> Target:
    """The architectures that were named: a compile needs no GPU, so there is none to ask."""
    if not rest:
        raise LlmcError(f"target {text!r}: name the architectures, as in cuda:sm_90; known: {', '.join(GPU_VARIANTS)}")
    for name in rest.split(","):
        if name not in GPU_VARIANTS:
            raise LlmcError(f"target {text!r}: unknown architecture {name!r}; {nearest(name, GPU_VARIANTS)}")
    chosen = {GPU_VARIANTS[name] for name in rest.split(",")}
    return Target("cuda", tuple(sorted(chosen, key=lambda v: v.capability)))
