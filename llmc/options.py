"""Every default of a compile, in one typed place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmc.ir.types import DType


@dataclass(frozen=True)
class Limits:
    """Upper bounds of a step: tokens of a prefill chunk and of a verify step, sequences of a batch, rows of logits."""

    tokens: int = 512
    verify_tokens: int = 64
    sequences: int = 64
    outputs: int = 64


LIMITS = {"cpu": Limits(), "cuda": Limits(tokens=2048)}
"""By kind of target. A GPU takes more tokens at once: with fewer, its matrix units wait for weights."""


@dataclass(frozen=True)
class CompileOptions:
    """What `llmc compile` was asked for."""

    target: str = "cpu"
    name: str | None = None
    quant: str = "none"
    """`none`, a format's name, or the path of a .toml file (see `quantization.read_quantization`)."""
    kv_quant: str | None = None
    architecture: Path | None = None
    max_sequence_length: int | None = None
    random_weights: bool = False
    force: bool = False
    wheel: bool = False
    dump_ir: Path | None = None
    check_numerics: bool = False
    tune: bool = False
    """Whether tilings are measured on the GPUs of this machine (see `tuning`)."""
    block_size: int = 16
    limits: Limits | None = None
    """None: what `LIMITS` has for the target."""
    checks: int = 3
    """How many prompts' logits are stored in the package for `verify`."""
    checks_max_parameters: int = 400_000_000
    """Above this many parameters the float64 interpreter is too slow to make the checks at compile."""
    weights: bool = True
    """False: weights are neither packed nor written, the manifest has their size and no hash. Such a package does not
    load; benchmarks fill the memory of its weights themselves."""


KV_DTYPES = {"f16": DType.F16, "bf16": DType.BF16, "f32": DType.F32, "int8": DType.I8, "fp8": DType.F8E4M3}
"""What `--kv-quant` accepts; `none` is the weights' dtype, `int8` codes with a scale for each vector, `fp8` f8e4m3
without scales."""

CPU_KV_DTYPES = tuple(name for name in KV_DTYPES if name != "fp8")
"""What it accepts where the target is a CPU."""
