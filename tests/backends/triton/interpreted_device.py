"""A GPU for `CudaExecutor` whose memory is the host's and whose kernels run in Triton's interpreter."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llmc.backends.triton.source import KernelSource
from llmc.runtime.cuda_driver import ALIGNMENT, Copy, KernelLaunch, Operation
from llmc.runtime.cuda_kernels import Kernel
from tests.backends.triton.interpreter import run

TENSORS = {
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*i32": torch.int32,
    "*i8": torch.int8,
    "*u8": torch.uint8,
    "*fp8e4nv": torch.float8_e4m3fn,
}


class InterpretedDevice:
    """Runs the kernels of `sources`, by symbol, when they are launched; a graph is a list that is walked again.

    `launched`: the symbols of all launches, in order; `replays`: how often a program was replayed.
    """

    def __init__(self, sources: Mapping[str, KernelSource], free: int = 1 << 30) -> None:
        self.name = "cuda:0 (interpreted)"
        self.sources = sources
        self.free = free
        self.launched: list[str] = []
        self.replays = 0
        self._memory: dict[int, torch.Tensor] = {}
        self._starts: list[int] = []

    def current_stream(self) -> int:
        return 0

    def memory(self) -> tuple[int, int]:
        return self.free, self.free

    def allocate(self, size: int) -> int:
        """NaN in every float dtype, and no zero in any: what reads memory before it was written shows."""
        tensor = torch.full((size + ALIGNMENT,), 0xFF, dtype=torch.uint8)
        address = -(-tensor.data_ptr() // ALIGNMENT) * ALIGNMENT
        self._memory[address] = tensor[address - tensor.data_ptr() :]
        bisect.insort(self._starts, address)
        return address

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        return np.zeros(size, np.uint8)

    def free_host(self, memory: NDArray[np.uint8]) -> None:
        pass

    def load(self, kernel: Kernel, image: bytes) -> None:
        assert kernel.symbol in self.sources

    def prepare(self, operations: Sequence[Operation]) -> _Program:
        return _Program(self, operations)

    def copy(self, copy: Copy, stream: int) -> None:
        ctypes.memmove(copy.destination, copy.source, copy.bytes)

    def zero(self, address: int, size: int, stream: int) -> None:
        ctypes.memset(address, 0, size)

    def synchronize(self, stream: int) -> None:
        pass

    def create_event(self) -> int:
        return 0

    def record(self, event: int, stream: int) -> None:
        pass

    def wait(self, event: int) -> None:
        pass

    def nanoseconds(self, start: int, end: int) -> int:
        return 1000

    def close(self) -> None:
        self._memory, self._starts = {}, []

    def launch(self, launch: KernelLaunch) -> None:
        source = self.sources[launch.kernel.symbol]
        self.launched.append(source.name)
        pairs = zip(source.arguments, launch.arguments, strict=True)
        run(source, launch.grid, {name: self.tensor(address, kind) for (name, kind), address in pairs})

    def tensor(self, address: int, kind: str) -> torch.Tensor:
        """What lies at an address, to the end of what was allocated there."""
        start = self._starts[bisect.bisect_right(self._starts, address) - 1]
        memory = self._memory[start][address - start :]
        dtype = TENSORS[kind]
        return memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)


class _Program:
    def __init__(self, device: InterpretedDevice, operations: Sequence[Operation]) -> None:
        self.device = device
        self.operations = operations

    def run(self, stream: int, first: int = 0, last: int | None = None) -> None:
        for operation in self.operations[first:last]:
            if isinstance(operation, Copy):
                self.device.copy(operation, stream)
            else:
                self.device.launch(operation)

    def replay(self, stream: int) -> None:
        self.device.replays += 1
        self.run(stream)
