"""A GPU through the CUDA driver: `cuda_driver.Device` in the context that other libraries of the process use too."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cuda_api import (
    ATTRIBUTE_MAJOR,
    ATTRIBUTE_MINOR,
    FUNCTION_SHARED,
    WRONG_IMAGE,
    CudaApi,
    DriverError,
    in_words,
)
from .cuda_driver import Copy, Operation, address_of
from .cuda_kernels import Kernel
from .cuda_launch import REPLAY_STEPS, OperationTable, describe, find_launcher
from .errors import ModelError

_NON_BLOCKING = 1
_THREAD_LOCAL = 1
"""Other threads of the process may do what they like while one of ours records a graph."""
_SHARED_BY_DEFAULT = 48 << 10


class CudaDevice:
    """A GPU by its ordinal; see `cuda_driver.Device`.

    Every method makes the device's primary context current and afterwards what was current before, so that threads,
    devices, packages and torch do not disturb each other. `launcher` is a launcher.so, or None. Raises `ModelError`.
    """

    def __init__(self, api: CudaApi, ordinal: int, launcher: Path | None = None) -> None:
        count = api.device_count()
        if count == 0:
            raise ModelError("no CUDA device: the driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?)")
        if ordinal >= count:
            known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
            raise ModelError(f"no device cuda:{ordinal}: this process sees {count} ({known})")
        self._api, self.ordinal = api, ordinal
        self._process = os.getpid()
        self._device = self._pointer("cuDeviceGet", ordinal, kind=ctypes.c_int)
        text = ctypes.create_string_buffer(256)
        api.call("cuDeviceGetName", text, len(text), self._device)
        self.name = f"cuda:{ordinal} ({text.value.decode('utf-8', 'replace')})"
        major, minor = (api.attribute(self._device, which) for which in (ATTRIBUTE_MAJOR, ATTRIBUTE_MINOR))
        self.capability = (major, minor)
        self._launcher = find_launcher(launcher, api)
        self.launcher = self._launcher.kind
        self._undo: list[Callable[[], int]] = []
        """What gives things back, in the order in which they were taken."""
        self._host: dict[int, NDArray[np.uint8]] = {}
        self._functions: dict[str, int] = {}
        self._context = self._pointer("cuDevicePrimaryCtxRetain", self._device, what=f"{self.name}: a context")
        self._closed, self._stream = False, 0
        try:
            with self._current():
                self._stream = self._take("cuStreamCreate", "cuStreamDestroy_v2", _NON_BLOCKING)
        except BaseException:
            self.close()
            raise

    def current_stream(self) -> int:
        """See `Device`. torch is only looked at where somebody else has imported and started it."""
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if cuda is not None and cuda.is_initialized():
            return int(cuda.current_stream(self.ordinal).cuda_stream)
        return self._stream

    def memory(self) -> tuple[int, int]:
        """See `Device`."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        with self._current():
            self._api.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """See `Device`."""
        with self._current():
            return self._take("cuMemAlloc_v2", "cuMemFree_v2", size, what=f"{self.name}: {size} bytes of memory")

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        """See `Device`."""
        with self._current():
            address = self._pointer("cuMemAllocHost_v2", size, what=f"{self.name}: {size} bytes of pinned memory")
        memory: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        memory[:] = 0
        self._host[address] = memory
        return memory

    def free_host(self, memory: NDArray[np.uint8]) -> None:
        """See `Device`."""
        address = address_of(memory)
        del self._host[address]
        with self._current():
            self._api.call("cuMemFreeHost", address)

    def load(self, kernel: Kernel, image: bytes) -> None:
        """See `Device`."""
        what = f"{self.name}: loading {kernel.symbol}"
        with self._current():
            try:
                # The driver reads text up to a zero byte.
                module = self._take("cuModuleLoadData", "cuModuleUnload", image + b"\0", what=what)
            except DriverError as error:
                if error.code not in WRONG_IMAGE:
                    raise
                raise DriverError(
                    f"{error}; the driver, for CUDA {in_words(self._api.version)}, does not take this code: install a "
                    "newer driver, or compile the package for this GPU",
                    error.code,
                ) from error
            function = self._pointer("cuModuleGetFunction", module, kernel.function.encode(), what=what)
            if kernel.shared > _SHARED_BY_DEFAULT:
                self._api.call("cuFuncSetAttribute", function, FUNCTION_SHARED, kernel.shared, what=what)
        self._functions[kernel.symbol] = function

    def prepare(self, operations: Sequence[Operation]) -> CudaProgram:
        """See `Device`."""
        return CudaProgram(self, operations, OperationTable(operations, self._functions))

    def copy(self, copy: Copy, stream: int) -> None:
        """See `Device`."""
        self.prepare([copy]).run(stream)

    def zero(self, address: int, size: int, stream: int) -> None:
        """See `Device`."""
        with self._current():
            self._api.call("cuMemsetD8Async", address, 0, size, stream, what=f"{self.name}: clearing memory")

    def synchronize(self, stream: int) -> None:
        """See `Device`."""
        with self._current():
            self._api.call("cuStreamSynchronize", stream, what=f"{self.name}: waiting for the GPU")

    def create_event(self) -> int:
        """See `Device`."""
        with self._current():
            return self._take("cuEventCreate", "cuEventDestroy_v2", 0)

    def record(self, event: int, stream: int) -> None:
        """See `Device`."""
        with self._current():
            self._api.call("cuEventRecord", event, stream)

    def wait(self, event: int) -> None:
        """See `Device`."""
        with self._current():
            self._api.call("cuEventSynchronize", event, what=f"{self.name}: waiting for the GPU")

    def nanoseconds(self, start: int, end: int) -> int:
        """See `Device`."""
        milliseconds = ctypes.c_float()
        with self._current():
            self._api.call("cuEventElapsedTime", ctypes.byref(milliseconds), start, end)
        return round(milliseconds.value * 1e6)

    def close(self) -> None:
        """See `Device`. In a process forked from the one that opened it there is nothing to give back."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._process:
            return
        # A context in which a kernel has failed refuses everything; there is nobody left to tell.
        with suppress(DriverError), self._current():
            self._api.functions["cuStreamSynchronize"](self._stream)
            for address in self._host:
                self._api.functions["cuMemFreeHost"](address)
            for undo in reversed(self._undo):
                undo()
        self._api.functions["cuDevicePrimaryCtxRelease_v2"](self._device)
        self._undo, self._host, self._functions = [], {}, {}

    def capture(self, run: Callable[[int], None]) -> int:
        """A graph of what `run` starts in the stream that it is given; nothing is executed."""
        call = partial(self._api.call, what=f"{self.name}: recording a step")
        graph = ctypes.c_void_p()
        with self._current():
            call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
            try:
                run(self._stream)
            except BaseException:
                # The stream is of no use until the recording has ended, however it ends.
                self._api.functions["cuStreamEndCapture"](self._stream, ctypes.byref(graph))
                if graph.value:
                    self._api.functions["cuGraphDestroy"](graph.value)
                raise
            call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
            try:
                return self._take("cuGraphInstantiateWithFlags", "cuGraphExecDestroy", graph.value, 0)
            finally:
                self._api.functions["cuGraphDestroy"](graph.value)

    def run(
        self, bound: Callable[[int, int, int], tuple[int, int]], span: tuple[int, int, int], shown: Sequence[Operation]
    ) -> None:
        """Start operations by a launcher's bound function; `span` is (first, last, stream)."""
        with self._current():
            code, failed = bound(*span)
        if code:
            launch = not isinstance(shown[failed], Copy)
            raise self._api.error(
                code, "cuLaunchKernelEx" if launch else "a copy", f"{self.name}: {describe(shown[failed])}"
            )

    def replay(self, graph: int, stream: int) -> None:
        """Run a graph and wait."""
        self.check_process()
        code, failed = self._launcher.replay(self._context, graph, stream)
        if code:
            raise self._api.error(code, REPLAY_STEPS[failed], f"{self.name}: a step of the model")

    def check_process(self) -> None:
        """Refuse to work in a child of the process that opened the device: a driver does not survive a fork."""
        if os.getpid() != self._process:
            raise ModelError(
                f"{self.name}: the model was loaded before this process was forked, and CUDA does not survive a fork; "
                "use multiprocessing's 'spawn', or load the model in the child alone"
            )

    def bind(self, table: OperationTable) -> Callable[[int, int, int], tuple[int, int]]:
        """The launcher's function for a table."""
        return self._launcher.bind(table)

    @contextmanager
    def _current(self) -> Iterator[None]:
        self.check_process()
        self._api.call("cuCtxPushCurrent_v2", self._context, what=self.name)
        try:
            yield
        finally:
            self._api.functions["cuCtxPopCurrent_v2"](ctypes.byref(ctypes.c_void_p()))

    def _pointer(self, name: str, *arguments: Any, what: str = "", kind: Any = ctypes.c_void_p) -> int:
        """What a function of the driver gives in its first argument."""
        value = kind()
        self._api.call(name, ctypes.byref(value), *arguments, what=what)
        return int(value.value or 0)

    def _take(self, name: str, undo: str, *arguments: Any, what: str = "") -> int:
        """The same, noted to be given back by the function `undo`."""
        value = self._pointer(name, *arguments, what=what)
        self._undo.append(partial(self._api.functions[undo], value))
        return value


class CudaProgram:
    """Operations in the driver's own terms; see `cuda_driver.Program`."""

    def __init__(self, device: CudaDevice, operations: Sequence[Operation], table: OperationTable) -> None:
        self._device, self._operations, self._table = device, operations, table
        self._bound = device.bind(table)
        self._graph: int | None = None

    def run(self, stream: int, first: int = 0, last: int | None = None) -> None:
        """See `Program`."""
        self._device.run(self._bound, (first, self._table.count if last is None else last, stream), self._operations)

    def replay(self, stream: int) -> None:
        """See `Program`."""
        if self._graph is None:
            self._graph = self._device.capture(self.run)
        self._device.replay(self._graph, stream)
