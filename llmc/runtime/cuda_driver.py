"""What the executor asks of a device: memory, copies, launches prepared once, and nothing of how they are done.

`cuda_device.CudaDevice` does it with the CUDA driver. Tests have one that runs kernels in Python: its addresses are
those of host memory, its `run` does each operation at once, and `replay` is `run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Union

import numpy as np
from numpy.typing import NDArray

from .cuda_kernels import Kernel

ALIGNMENT = 256
"""Bytes to whose multiple `allocate` aligns, as the driver does."""


@dataclass(frozen=True)
class KernelLaunch:
    """Run a kernel on a grid of blocks. `arguments`: device addresses, without the two hidden ones."""

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: tuple[int, ...]


@dataclass(frozen=True)
class Copy:
    """Copy `bytes` bytes between addresses, in the order of the stream.

    `to_device` reads and `to_host` writes host memory, which must be pinned where the copy is to run beside the host.
    """

    direction: Literal["to_device", "to_host", "on_device"]
    destination: int
    source: int
    bytes: int


Operation = Union[KernelLaunch, Copy]  # noqa: UP007 - evaluated at import, where Python 3.10 is to understand it


class Program(Protocol):
    """Operations with fixed addresses, prepared once and run many times, one after another."""

    def run(self, stream: int, first: int = 0, last: int | None = None) -> None:
        """Start operations first..last (all without them) in a stream. Does not wait."""

    def replay(self, stream: int) -> None:
        """Run all operations in a stream, by one call of the driver, and wait until they are done.

        The first time they are recorded as a graph.
        """


class Device(Protocol):
    """One GPU, with everything that was taken of it; a stream is a number that the device understands.

    Errors are `ModelError`; those of the driver are `cuda_api.DriverError`, with its code.
    """

    name: str
    """As a user knows it, with its ordinal: `cuda:0 (NVIDIA H200)`."""

    def current_stream(self) -> int:
        """The stream for what is to be done now: torch's where torch is in use, else the device's own."""

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all."""

    def allocate(self, size: int) -> int:
        """The address of `size` bytes (at least one) of device memory, whatever they hold."""

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        """Pinned host memory, u8[size], zeroed."""

    def free_host(self, memory: NDArray[np.uint8]) -> None:
        """Give back what `allocate_host` gave."""

    def load(self, kernel: Kernel, image: bytes) -> None:
        """Make a kernel known by its code, a cubin or PTX; launches of it may follow."""

    def prepare(self, operations: Sequence[Operation]) -> Program:
        """Get operations ready to run."""

    def copy(self, copy: Copy, stream: int) -> None:
        """Start a copy."""

    def zero(self, address: int, size: int, stream: int) -> None:
        """Start to fill device memory with zeros."""

    def synchronize(self, stream: int) -> None:
        """Wait until everything in a stream is done."""

    def create_event(self) -> int:
        """A mark that can be put into a stream, again and again."""

    def record(self, event: int, stream: int) -> None:
        """Put an event into a stream."""

    def wait(self, event: int) -> None:
        """Wait until the stream has come to where the event was put last; at once where it never was."""

    def nanoseconds(self, start: int, end: int) -> int:
        """The time between two events that the streams have come to."""

    def close(self) -> None:
        """Give everything back; nothing may follow. A second time does nothing."""


def address_of(memory: NDArray[Any]) -> int:
    """The address of host memory."""
    return int(memory.ctypes.data)
