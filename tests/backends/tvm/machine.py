"""Runs single kernels in this process: compiled once, bound by ctypes, their buffers against unreadable pages."""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from llmc.backends.tvm.compile import compile_kernel
from llmc.backends.tvm.isa import ISAS, Isa
from llmc.ir.target import CPU_VARIANTS

Array = NDArray[Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": BF16}
POISON = 0xFF  # all ones are a NaN in every float type, and -1 in integers

V3 = ISAS["x86-64-v3"]
FLAGS = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
needs_v3 = pytest.mark.skipif(
    not {"avx2", "fma", "f16c"} <= FLAGS, reason="needs AVX2, FMA and F16C: this processor has not all of them"
)


def runs_here(isa: Isa) -> bool:
    """Whether this processor has what an instruction set's kernels use."""
    variant = CPU_VARIANTS[isa.name]
    return variant.machine == platform.machine() and set(variant.requires) <= FLAGS


_libc = ctypes.CDLL(None)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """An array that ends where an unreadable page begins, with a known pattern before it.

    A read or write past its end is a segmentation fault; `check` finds writes before its start.
    """

    def __init__(self, shape: Sequence[int], dtype: DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        bytes_ = int(np.prod(shape)) * self.dtype.itemsize
        pages = -(-(bytes_ + 256) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        raw = np.frombuffer(self.memory, np.uint8)
        assert _libc.mprotect(raw.ctypes.data + pages, mmap.PAGESIZE, 0) == 0
        raw[:pages] = POISON
        self.before = raw[: pages - bytes_]
        self.array: Array = raw[pages - bytes_ : pages].view(self.dtype).reshape(tuple(shape))

    def check(self) -> None:
        """Raises when something was written before the array."""
        assert (self.before == POISON).all(), "a kernel wrote before a buffer"


def guard(values: Array) -> Array:
    """A copy of an array against an unreadable page."""
    guarded = Guarded(values.shape, values.dtype)
    guarded.array[...] = values
    return guarded.array


class Kernel:
    """A compiled kernel. Calling it runs all tasks one after another over guarded copies of the inputs."""

    def __init__(self, maker: Callable[..., Any], isa: Isa, **parameters: Any) -> None:
        self.name = maker.__name__
        self.address, self._library = _build(maker, isa, tuple(sorted(parameters.items())))

    def __call__(self, dims: Sequence[int], arguments: Sequence[Array | Guarded], tasks: int = 1) -> None:
        """Arguments in C order: arrays are inputs (copied), `Guarded` ones are outputs and states (checked)."""
        sizes = guard(np.array([*dims, 0, 0, 0, 0][:4], np.int32))
        arrays = [a.array if isinstance(a, Guarded) else guard(a) for a in arguments]
        function = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_int32, *[ctypes.c_void_p] * (1 + len(arrays)))(
            self.address
        )
        for task in range(tasks):
            function(task, tasks, sizes.ctypes.data, *[a.ctypes.data for a in arrays])
        for argument, array in zip(arguments, arrays, strict=True):
            if isinstance(argument, Guarded):
                argument.check()
            else:
                assert array.tobytes() == argument.tobytes(), f"{self.name} wrote to an input"


@functools.cache
def _build(maker: Callable[..., Any], isa: Isa, parameters: tuple[tuple[str, Any], ...]) -> tuple[int, ctypes.CDLL]:
    code = compile_kernel(maker("kernel", isa, **dict(parameters)), isa)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernel.o").write_bytes(code)
        subprocess.run(["gcc", "-shared", "kernel.o", "-o", "kernel.so"], cwd=folder, check=True)
        library = ctypes.CDLL(str(folder / "kernel.so"))
    address = ctypes.cast(library.kernel, ctypes.c_void_p).value
    assert address is not None
    return address, library


def stored(values: Array, dtype: str) -> Array:
    """Rounded to a storage dtype."""
    return values.astype(DTYPES[dtype])


def f32(values: Array) -> Array:
    """Stored values as float32: exact."""
    return values.astype(np.float32)


def f64(values: Array) -> Array:
    """Stored values as float64: exact."""
    return values.astype(np.float64)


def same_bits(a: Array, b: Array) -> bool:
    """Equal bit for bit."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()
