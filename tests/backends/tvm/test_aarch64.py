"""Kernels for aarch64: cross-compiled always; run under qemu where it and a cross compiler are installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from llmc.backends.tvm.backend import TvmBackend
from llmc.backends.tvm.compile import compile_kernel, link
from llmc.backends.tvm.isa import ISAS
from llmc.backends.tvm.kernels.linear import linear
from llmc.backends.tvm.kernels.norm import rms_norm
from llmc.backends.tvm.kernels.quantized import quantized_linear
from llmc.backends.tvm.kernels.tiles import quantize_tiles
from llmc.backends.tvm.packing import pack
from llmc.ir.errors import LlmcError
from llmc.ir.target import parse_target
from tests.backends.tvm.machine import Array
from tests.backends.tvm.test_quantized import Tiles, Weight, product, quantized
from tests.tolerance import assert_as_good_as

ISA = ISAS["aarch64"]
GCC, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
EM_AARCH64 = 183


def machine(elf: bytes) -> int:
    """The machine that an ELF file is for."""
    return int.from_bytes(elf[18:20], "little")


def run(
    folder: Path, maker: Callable[..., Any], rows: int, arguments: Sequence[Array], **parameters: Any
) -> list[Array] | None:
    """Compile a kernel; where it can be run, the arguments as two tasks left them."""
    code = compile_kernel(maker("kernel", ISA, **parameters), ISA)
    assert machine(code) == EM_AARCH64
    if shutil.which(GCC) is None or shutil.which(QEMU) is None:
        return None
    (folder / "kernel.o").write_bytes(code)
    source = Path(__file__).parent / "aarch64_harness.c"
    subprocess.run([GCC, "-static", str(source), "kernel.o", "-o", "harness", "-lm"], cwd=folder, check=True)
    for i, array in enumerate(arguments):
        array.tofile(folder / str(i))
    names = [str(i) for i in range(len(arguments))]
    command = [QEMU, "-cpu", "max", "./harness", "2", str(rows), "7", "7", "7", *names]
    subprocess.run(command, cwd=folder, check=True)
    return [np.fromfile(folder / n, a.dtype).reshape(a.shape) for n, a in zip(names, arguments, strict=True)]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_linear(tmp_path: Path, bits: int) -> None:
    rng = np.random.default_rng(bits)
    x, weight = quantized(rng.standard_normal((5, 90)).astype(np.float32)), Weight(450, 90, bits, rng)
    arguments = [*x.inputs, *weight.packed, np.full((5, 450), np.nan, np.float32)]
    done = run(tmp_path, quantized_linear, 5, arguments, rows_dim=0, n=450, k=90, bits=bits)
    if done is not None:
        assert_as_good_as(done[-1], product(x, weight, np.float32), product(x, weight, np.float64))


def test_quantize_tiles(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
    tiles, expected = Tiles(3, 100), quantized(x)
    done = run(tmp_path, quantize_tiles, 3, [x, *(t.array for t in tiles.outputs)], rows_dim=0, width=100)
    for given, wanted in zip(done[1:] if done else [], expected.outputs, strict=bool(done)):
        assert (given == wanted.array).all()


def test_floats(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((9, 100)).astype(np.float32), rng.standard_normal(100).astype(np.float32)
    done = run(tmp_path, rms_norm, 9, [x, w, np.full_like(x, np.nan)], rows_dim=0, hidden=100, eps=1e-5)
    if done is not None:
        truth = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * w
        naive = x / np.sqrt((x**2).mean(1, keepdims=True) + np.float32(1e-5)) * w
        assert_as_good_as(done[-1], naive, truth)
    weight = rng.standard_normal((240, 100)).astype(ml_dtypes.bfloat16)
    arguments = [x, pack(weight), np.full((9, 240), np.nan, np.float32)]
    done = run(tmp_path, linear, 9, arguments, rows_dim=0, n=240, k=100, weight_dtype="bf16")
    if done is not None:
        truth = x.astype(np.float64) @ weight.astype(np.float64).T
        naive = np.zeros((9, 240), np.float32)
        for i in range(100):
            naive += x[:, i, None] * weight.astype(np.float32)[None, :, i]
        assert_as_good_as(done[-1], naive, truth)


def test_the_library_is_linked_by_a_cross_compiler_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which(GCC) is not None:
        link({}, ISA, tmp_path / "out.so")
        assert machine((tmp_path / "out.so").read_bytes()) == EM_AARCH64
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LlmcError, match=rf"{GCC}' was not found: install it \(.*apt install gcc-aarch64-linux-gnu\)"):
        TvmBackend(parse_target("cpu:aarch64", frozenset()), longest=64)


def test_machines_are_not_mixed() -> None:
    with pytest.raises(LlmcError, match="one package is for one kind of machine"):
        parse_target("cpu:x86-64-v3,aarch64", frozenset())
