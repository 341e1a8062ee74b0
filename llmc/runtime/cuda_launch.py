"""How operations are started: by a package's launcher.so in one call, or one by one with ctypes where it does not load.

Both do the same with the same tables; see native/cuda/launcher.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .cuda_api import CudaApi
from .cuda_driver import Copy, KernelLaunch, Operation

_INTERFACE = "llmc-cuda 1"
_LAUNCH, _COPIES = 0, {"to_device": 1, "to_host": 2, "on_device": 3}
_SERIALIZATION = 6
_FUNCTIONS = (
    "cuLaunchKernelEx",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuGraphLaunch",
    "cuStreamSynchronize",
)
REPLAY_STEPS = ("cuCtxPushCurrent_v2", "cuGraphLaunch", "cuStreamSynchronize")
"""What a replay may fail in, by the number that it gives."""


class _Value(ctypes.Union):
    _fields_ = [("bytes", ctypes.c_char * 64), ("allowed", ctypes.c_int32)]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int32), ("padding", ctypes.c_int32), ("value", _Value)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint32),
    ]


class _Operation(ctypes.Structure):
    """The C struct `Operation`."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
        ("dependent", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("function", ctypes.c_void_p),
        ("parameters", ctypes.c_void_p),
        ("destination", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
    ]


class OperationTable:
    """Operations as C structs: `address` of the first, `count`; owns what they point to.

    A kernel gets its arguments and two null pointers, to scratch memory that ours do without. It is started before its
    predecessor ends only where that is a kernel too.
    """

    def __init__(self, operations: Sequence[Operation], functions: Mapping[str, int]) -> None:
        self.count = len(operations)
        self.items = (_Operation * self.count)()
        self.address = ctypes.addressof(self.items)
        values = [[*o.arguments, 0, 0] if isinstance(o, KernelLaunch) else [] for o in operations]
        self._arguments = np.array([a for each in values for a in each], np.uint64)
        start = int(self._arguments.ctypes.data)
        self._parameters = np.arange(len(self._arguments), dtype=np.uint64) * np.uint64(8) + np.uint64(start)
        parameters, before = int(self._parameters.ctypes.data), None
        for item, operation, arguments in zip(self.items, operations, values, strict=True):
            if isinstance(operation, KernelLaunch):
                kernel = operation.kernel
                item.kind, item.grid, item.function = _LAUNCH, operation.grid, functions[kernel.symbol]
                item.threads, item.shared = kernel.threads, kernel.shared
                item.dependent = kernel.dependent and isinstance(before, KernelLaunch)
                item.parameters = parameters
                parameters += 8 * len(arguments)
            else:
                item.kind, item.bytes = _COPIES[operation.direction], operation.bytes
                item.destination, item.source = operation.destination, operation.source
            before = operation


class Launcher(Protocol):
    """Starts operations. Both methods give a CUresult, and the number of what failed."""

    kind: str

    def bind(self, table: OperationTable) -> Callable[[int, int, int], tuple[int, int]]:
        """A function that starts operations first..last in a stream: (first, last, stream) -> (CUresult, which)."""

    def replay(self, context: int, graph: int, stream: int) -> tuple[int, int]:
        """Run a graph in a context and wait; what failed is an index into `REPLAY_STEPS`."""


class NativeLauncher:
    """A package's launcher.so. Raises `OSError` where it does not load, or is for another runtime."""

    kind = "native"

    def __init__(self, path: Path, api: CudaApi) -> None:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        try:
            library.llmc_cuda_build.restype = ctypes.c_char_p
            self._run, self._replay = library.llmc_cuda_run, library.llmc_cuda_replay
            build = library.llmc_cuda_build() or b""
        except AttributeError as error:
            raise OSError(f"{path} is no launcher: {error}") from error
        if build.decode("utf-8", "replace") != _INTERFACE:
            raise OSError(f"{path} has the interface {build!r}, this runtime expects {_INTERFACE!r}")
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        self._run.argtypes = [pointer, pointer, number, number, pointer, pointer]
        self._replay.argtypes = [pointer, pointer, pointer, pointer, pointer]
        self._driver = (ctypes.c_void_p * len(_FUNCTIONS))(*(api.address(name) for name in _FUNCTIONS))
        self._library, self._api = library, api

    def bind(self, table: OperationTable) -> Callable[[int, int, int], tuple[int, int]]:
        """See `Launcher`."""

        def run(first: int, last: int, stream: int) -> tuple[int, int]:
            failed = ctypes.c_int32(0)
            code = self._run(self._driver, table.address, first, last, stream, ctypes.byref(failed))
            return code, failed.value

        return run

    def replay(self, context: int, graph: int, stream: int) -> tuple[int, int]:
        """See `Launcher`."""
        failed = ctypes.c_int32(0)
        code = self._replay(self._driver, context, graph, stream, ctypes.byref(failed))
        return code, failed.value


class CtypesLauncher:
    """The same without a library of our own; each operation costs some microseconds of Python."""

    kind = "ctypes"

    def __init__(self, api: CudaApi) -> None:
        self._functions = [api.functions[name] for name in _FUNCTIONS]

    def bind(self, table: OperationTable) -> Callable[[int, int, int], tuple[int, int]]:
        """See `Launcher`."""
        attribute = _Attribute(_SERIALIZATION, 0, _Value(allowed=1))
        configs = [
            _Config(item.grid, (item.threads, 1, 1), item.shared, None, ctypes.pointer(attribute), item.dependent)
            for item in table.items
        ]
        launch, *copies = self._functions[:4]

        def start(item: Any, config: _Config, stream: int) -> int:
            if item.kind == _LAUNCH:
                config.stream = stream
                return int(launch(ctypes.byref(config), item.function, item.parameters, None))
            return int(copies[item.kind - 1](item.destination, item.source, item.bytes, stream))

        def run(first: int, last: int, stream: int) -> tuple[int, int]:
            for i in range(first, last):
                code = start(table.items[i], configs[i], stream)
                if code:
                    return code, i
            return 0, 0

        return run

    def replay(self, context: int, graph: int, stream: int) -> tuple[int, int]:
        """See `Launcher`."""
        push, pop, launch, synchronize = self._functions[4:]
        code = push(context)
        if code:
            return code, 0
        failed, code = 1, launch(graph, stream)
        if not code:
            failed, code = 2, synchronize(stream)
        last = pop(ctypes.byref(ctypes.c_void_p()))
        return code or last, failed


def find_launcher(path: Path | None, api: CudaApi) -> Launcher:
    """The launcher in a file, or one that needs none where there is no file or it does not load here."""
    if path is not None:
        try:
            return NativeLauncher(path, api)
        except OSError:
            return CtypesLauncher(api)  # `info` names the launcher, so nobody is misled
    return CtypesLauncher(api)


def describe(operation: Operation) -> str:
    """What was being done, for an error message."""
    if isinstance(operation, Copy):
        return f"a copy of {operation.bytes} bytes ({operation.direction.replace('_', ' ')})"
    kernel, grid = operation.kernel, " x ".join(map(str, operation.grid))
    return f"launch of {kernel.symbol} (grid {grid}, {kernel.threads} threads, {kernel.shared} bytes shared)"
