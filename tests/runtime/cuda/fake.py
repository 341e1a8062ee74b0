"""The fake CUDA driver from Python: built with gcc, configured, and its log of calls."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class _Entry(ctypes.Structure):
    _fields_ = [
        ("call", ctypes.c_char * 32),
        ("name", ctypes.c_char * 64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("dependent", ctypes.c_int32),
        ("captured", ctypes.c_int32),
        ("replayed", ctypes.c_int32),
        ("arguments", ctypes.c_int32),
        ("padding", ctypes.c_int32),
        ("values", ctypes.c_uint64 * 32),
        ("stream", ctypes.c_uint64),
        ("destination", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Call:
    """A call in the log. `how`: `eager`, `captured` into a graph, or `replayed` by one."""

    call: str
    how: str
    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    dependent: bool
    arguments: tuple[int, ...]
    stream: int
    destination: int
    source: int
    bytes: int


class FakeCuda:
    """A built fake driver. One test uses it at a time; `reset` forgets the log and a fault."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.fake_entry.restype = ctypes.POINTER(_Entry)

    def reset(self) -> None:
        self._library.fake_reset()

    def restart(self) -> None:
        """Forget everything, as a new process would."""
        self._library.fake_restart()

    def log(self) -> list[Call]:
        """All calls since `reset`."""
        return [_call(self._library.fake_entry(i).contents) for i in range(self._library.fake_count())]

    def calls(self) -> list[str]:
        """The names of what was called; what a graph does is not called."""
        return [entry.call for entry in self.log() if entry.how != "replayed"]

    def launches(self, how: str) -> list[Call]:
        return [entry for entry in self.log() if entry.call == "cuLaunchKernelEx" and entry.how == how]

    @property
    def alive(self) -> tuple[int, int, int, int, int]:
        """How many pieces of device memory, pinned memory, modules, other things, and contexts are not given back."""
        library = self._library
        device, host, modules, others = (int(library.fake_alive(kind)) for kind in range(4))
        return device, host, modules, others, int(library.fake_retained())

    @property
    def depth(self) -> int:
        """How many contexts this thread has pushed and not popped."""
        return int(self._library.fake_depth())


def _call(entry: _Entry) -> Call:
    how = "replayed" if entry.replayed else "captured" if entry.captured else "eager"
    return Call(
        call=entry.call.decode(),
        how=how,
        name=entry.name.decode(),
        grid=tuple(entry.grid),
        block=tuple(entry.block),
        shared=entry.shared,
        dependent=bool(entry.dependent),
        arguments=tuple(entry.values[: entry.arguments]),
        stream=entry.stream,
        destination=entry.destination,
        source=entry.source,
        bytes=entry.bytes,
    )


def build_fake_driver(folder: Path, *flags: str) -> Path:
    """libcuda.so.1 in a folder."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("the fake CUDA driver is built by gcc")
    library = folder / "libcuda.so.1"
    sources = sorted(str(path) for path in HERE.glob("*.c"))
    options = ["-shared", "-fPIC", "-O1", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([compiler, *options, *flags, *sources, "-o", str(library)], check=True)
    return library
