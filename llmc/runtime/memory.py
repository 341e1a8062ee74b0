"""Memory that kernels see: anonymous mappings (64-byte aligned, untouched pages cost nothing) and the weights' file."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ModelError

HUGE_PAGE = 1 << 21
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's value; Python names it since 3.13
_SLACK = 64
"""Bytes kept behind the last one asked for, so that a vector load that starts inside stays inside."""


def reserve(size: int) -> NDArray[np.uint8]:
    """`size` zero bytes, page-aligned, as u8[size]; a page costs memory from the moment it is touched.

    Raises `ModelError` where the operating system refuses.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    try:
        mapping = mmap.mmap(-1, size + _SLACK, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        raise ModelError(f"cannot reserve {size} bytes of memory: {error}") from error
    return np.frombuffer(mapping, np.uint8)[:size]


def allocate(shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
    """A zeroed array of its own mapping."""
    count = int(np.prod(shape, dtype=np.int64))
    array: NDArray[Any] = reserve(count * np.dtype(dtype).itemsize).view(dtype)
    return array.reshape(shape)


def map_file(path: Path, size: int) -> NDArray[np.uint8]:
    """A file of `size` bytes as read-only u8[size], shared between processes. Raises `ModelError`."""
    try:
        with path.open("rb") as file:
            if not size:
                return np.zeros(0, np.uint8)
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot map {path}: {error}") from error
    return np.frombuffer(mapping, np.uint8)


def copy_to_huge_pages(
    data: NDArray[np.uint8], copy: Callable[[NDArray[np.uint8], NDArray[np.uint8]], None]
) -> NDArray[np.uint8]:
    """A copy of the weights in anonymous memory that asks for transparent huge pages; `copy(destination, source)`.

    The result starts at a 2 MiB boundary. Where the kernel has no huge pages it is a plain copy.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        mapping = mmap.mmap(-1, data.size + HUGE_PAGE + _SLACK, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        raise ModelError(f"huge_pages=True needs {data.size} bytes of memory: {error}") from error
    with contextlib.suppress(AttributeError, OSError):  # without huge pages the copy is of no use, but not wrong
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    target = whole[start : start + data.size]
    copy(target, data)
    return target
