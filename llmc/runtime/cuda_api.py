"""libcuda.so.1, the CUDA driver, bound by ctypes: its functions by name, and its errors in words."""

from __future__ import annotations

import ctypes
from typing import Any

from .errors import ModelError

LIBRARY = "libcuda.so.1"
LEAST_DRIVER = 12030
"""CUDA 12.3 (driver 545) is the first that records dependent launches in a graph."""

OUT_OF_MEMORY, NO_DEVICE, NOT_INITIALIZED = 2, 100, 3
WRONG_IMAGE = (200, 209, 218, 222)
"""Codes of a module that the driver does not take: invalid, of another architecture, invalid or too new PTX."""

ATTRIBUTE_MAJOR, ATTRIBUTE_MINOR = 75, 76
FUNCTION_SHARED = 8
"""The attribute of a function that allows more than 48 KB of dynamic shared memory."""

_P, _I, _U, _S, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_uint64
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [_U],
    "cuDriverGetVersion": [_P],
    "cuDeviceGetCount": [_P],
    "cuDeviceGet": [_P, _I],
    "cuDeviceGetName": [_P, _I, _I],
    "cuDeviceGetAttribute": [_P, _I, _I],
    "cuDevicePrimaryCtxRetain": [_P, _I],
    "cuDevicePrimaryCtxRelease_v2": [_I],
    "cuCtxPushCurrent_v2": [_P],
    "cuCtxPopCurrent_v2": [_P],
    "cuMemGetInfo_v2": [_P, _P],
    "cuMemAlloc_v2": [_P, _S],
    "cuMemFree_v2": [_D],
    "cuMemAllocHost_v2": [_P, _S],
    "cuMemFreeHost": [_P],
    "cuMemcpyHtoDAsync_v2": [_D, _P, _S, _P],
    "cuMemcpyDtoHAsync_v2": [_P, _D, _S, _P],
    "cuMemcpyDtoDAsync_v2": [_D, _D, _S, _P],
    "cuMemsetD8Async": [_D, ctypes.c_ubyte, _S, _P],
    "cuModuleLoadData": [_P, _P],
    "cuModuleUnload": [_P],
    "cuModuleGetFunction": [_P, _P, ctypes.c_char_p],
    "cuFuncSetAttribute": [_P, _I, _I],
    "cuLaunchKernelEx": [_P, _P, _P, _P],
    "cuStreamCreate": [_P, _U],
    "cuStreamDestroy_v2": [_P],
    "cuStreamSynchronize": [_P],
    "cuStreamBeginCapture_v2": [_P, _I],
    "cuStreamEndCapture": [_P, _P],
    "cuGraphInstantiateWithFlags": [_P, _P, ctypes.c_ulonglong],
    "cuGraphDestroy": [_P],
    "cuGraphLaunch": [_P, _P],
    "cuGraphExecDestroy": [_P],
    "cuEventCreate": [_P, _U],
    "cuEventRecord": [_P, _P],
    "cuEventSynchronize": [_P],
    "cuEventElapsedTime": [_P, _P, _P],
    "cuEventDestroy_v2": [_P],
    "cuGetErrorName": [_I, _P],
    "cuGetErrorString": [_I, _P],
}


class DriverError(ModelError):
    """A call of the driver failed; `code` is its CUresult."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class CudaApi:
    """The functions of a CUDA driver. `functions[name]` is called as C calls it and returns a CUresult.

    `library` is what the system's loader is asked for. Raises `ModelError` when there is no driver, no device, or a
    driver that is too old.
    """

    def __init__(self, library: str | None = None) -> None:
        path = library or LIBRARY
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise ModelError(
                f"no CUDA driver: {path} cannot be loaded ({error}); this package runs on NVIDIA GPUs: install their "
                "driver, or compile the model for a CPU"
            ) from error
        self.functions: dict[str, Any] = {}
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(self._library, name)
            except AttributeError:
                raise ModelError(
                    f"the CUDA driver ({path}) is too old: it has no {name}; "
                    f"install one for CUDA {in_words(LEAST_DRIVER)} or newer"
                ) from None
            function.argtypes, function.restype = arguments, _I
            self.functions[name] = function
        self.version = self._start(path)

    def call(self, name: str, *arguments: Any, what: str = "") -> None:
        """Call a function of the driver. Raises `DriverError` naming the function and what it was called for."""
        code = self.functions[name](*arguments)
        if code:
            raise self.error(code, name, what)

    def error(self, code: int, name: str, what: str = "") -> DriverError:
        """The error for a code that `name` returned: what was being done, and the driver's own words."""
        return DriverError(f"{what or 'the CUDA driver'}: {name} failed: {self.describe(code)}", code)

    def describe(self, code: int) -> str:
        """A CUresult in the driver's words."""
        words = []
        for function in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            self.functions[function](code, ctypes.byref(text))
            words.append((text.value or b"?").decode("utf-8", "replace"))
        return f"{words[0]} ({code}): {words[1]}"

    def address(self, name: str) -> int:
        """The address of a function of the driver."""
        return ctypes.cast(self.functions[name], _P).value or 0

    def device_count(self) -> int:
        """How many GPUs this process may use."""
        count = _I()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return count.value

    def attribute(self, device: int, attribute: int) -> int:
        """An attribute of a device, by CUdevice."""
        value = _I()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value

    def _start(self, path: str) -> int:
        version = _I()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        if version.value < LEAST_DRIVER:
            raise ModelError(
                f"the CUDA driver ({path}) is too old: it is for CUDA {in_words(version.value)}; "
                f"install one for CUDA {in_words(LEAST_DRIVER)} or newer"
            )
        code = self.functions["cuInit"](0)
        if code == NO_DEVICE:
            raise ModelError("no CUDA device: the driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?)")
        if code == NOT_INITIALIZED:
            raise ModelError(
                "CUDA cannot be started in a process that was forked from one that uses it; "
                "use multiprocessing's 'spawn', or load the model only in the child"
            )
        if code:
            raise self.error(code, "cuInit", "starting CUDA")
        return version.value


def in_words(version: int) -> str:
    """A version as CUDA counts them, 12030, as it is written, 12.3."""
    return f"{version // 1000}.{version % 1000 // 10}"
