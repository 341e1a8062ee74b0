"""The package's compiled library, bound by ctypes: the thread pool, the step walker, and kernels by name."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ModelError

_INTERFACE = "llmc-native 2 "
"""How `llmc_build()` begins: the version of the C interface that this file is written for."""

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
_INT32 = ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llmc_pool_create": (_POINTER, [_INT]),
    "llmc_pool_destroy": (None, [_POINTER]),
    "llmc_pool_threads": (_INT, [_POINTER]),
    "llmc_step": (_INT, [_POINTER, _POINTER, _INT32, _POINTER, _POINTER, _INT32, _INT32, _POINTER, _POINTER]),
    "llmc_copy": (None, [_POINTER, _POINTER, _POINTER, _LONG]),
    "llmc_read_bandwidth": (ctypes.c_double, [_POINTER, _POINTER, _LONG]),
    "llmc_build": (ctypes.c_char_p, []),
}

LAUNCH = np.dtype([("kernel", "<i4"), ("arg_count", "<i4"), ("first_arg", "<i4"), ("flags", "<i4")])
"""The C struct `Launch`, as a record of an array."""

BARRIER, EACH = 1, 2
"""The flags of a launch: all tasks wait after it; every task runs it for itself when there are few tokens."""


class NativeLibrary:
    """A kernels-*.so with its own thread pool of `threads` threads, the caller's included.

    0 is as many as this process may use: its affinity, cut to its cgroup's quota.

    Raises `ModelError` when the file is no such library or cannot be loaded here.
    """

    def __init__(self, path: Path, threads: int) -> None:
        try:
            # RTLD_LOCAL: another package's library in this process has the same names.
            self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise ModelError(
                f"cannot load {path}: {error}; the package is damaged or made for another machine"
            ) from error
        self.build = (self._library.llmc_build() or b"").decode("utf-8", "replace")
        if not self.build.startswith(_INTERFACE):
            raise ModelError(f"{path} has the interface {self.build!r}, this runtime expects {_INTERFACE.strip()!r}")
        self.path = path
        self._pool = self._library.llmc_pool_create(threads)
        if not self._pool:
            raise ModelError(f"cannot start {threads or 'the'} threads; load with a smaller threads=")
        self._finalizer = weakref.finalize(self, self._library.llmc_pool_destroy, self._pool)
        # At the interpreter's exit the operating system ends the threads; a process forked from this one has none.
        self._finalizer.atexit = False

    @property
    def threads(self) -> int:
        """How many threads the pool has."""
        return int(self._library.llmc_pool_threads(self._pool))

    def kernel_addresses(self, names: Iterable[str]) -> NDArray[np.uint64]:
        """The addresses of kernels by their C names, u64[kernels]. Raises `ModelError` for a missing one."""
        return np.array([self._address(name) for name in names], np.uint64)

    def step(
        self,
        launches: int,
        count: int,
        kernels: int,
        args: int,
        args_stride: int,
        each_tokens: int,
        dims: int,
        nanoseconds: int,
    ) -> None:
        """Walk `count` launches in the pool. Raises `ModelError`.

        `args` holds `args_stride` pointers for each thread. In steps of up to `each_tokens` tokens every task runs the
        launches flagged `EACH` for itself. The other numbers are addresses; `nanoseconds` may be 0.
        """
        status = self._library.llmc_step(
            self._pool, launches, count, kernels, args, args_stride, each_tokens, dims, nanoseconds or None
        )
        if status:
            raise ModelError(f"a step failed in {self.path.name} with status {status}")

    def copy(self, destination: NDArray[np.uint8], source: NDArray[np.uint8]) -> None:
        """Copy bytes with all threads; both arrays are contiguous and of one size."""
        assert destination.size == source.size
        self._library.llmc_copy(self._pool, destination.ctypes.data, source.ctypes.data, source.size)

    def read_bandwidth(self, data: NDArray[np.uint8]) -> float:
        """Bytes per second at which all threads read `data` once: the bound that measured times are held against."""
        return float(self._library.llmc_read_bandwidth(self._pool, data.ctypes.data, data.size))

    def _address(self, name: str) -> int:
        try:
            return ctypes.cast(self._library[name], _POINTER).value or 0
        except (AttributeError, ValueError) as error:
            raise ModelError(f"{self.path} has no kernel {name[:80]!r}; the package is damaged") from error

    def close(self) -> None:
        """End the threads; the library stays mapped."""
        self._finalizer()
