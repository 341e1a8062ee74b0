"""A GPU for `llmc.tuning` that runs nothing: every launch takes the time that a table gives its kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc.backends.triton.compile import Compiled
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GpuVariant
from llmc.runtime.cuda_driver import ALIGNMENT, Copy, KernelLaunch, Operation
from llmc.runtime.cuda_kernels import Kernel
from llmc.runtime.errors import ModelError

Times = Callable[[KernelSource], float]
"""Seconds that one launch of a kernel takes."""


class FakeGpu:
    """`times` by kernel; `refused`: symbols that do not load. `measured`: the symbols of what was replayed, in order.

    `sources` must know every kernel: `FakeCompiler` fills it.
    """

    def __init__(
        self,
        times: Times = lambda source: 1e-5,
        capability: tuple[int, int] = (9, 0),
        sources: Mapping[str, KernelSource] | None = None,
    ) -> None:
        self.name = f"cuda:0 (fake {capability})"
        self.capability = capability
        self.times = times
        self.sources = sources if sources is not None else {}
        self.refused: set[str] = set()
        self.loaded: list[str] = []
        self.measured: list[str] = []
        self.closed = False
        self.allocated: list[tuple[int, int]] = []
        self._now = 0.0
        self._events: list[float] = []

    def current_stream(self) -> int:
        return 7

    def memory(self) -> tuple[int, int]:
        return 1 << 36, 1 << 36

    def allocate(self, size: int) -> int:
        address = ALIGNMENT * (1 + max((a + s for a, s in self.allocated), default=0) // ALIGNMENT)
        self.allocated.append((address, size))
        return address

    def allocate_host(self, size: int) -> NDArray[np.uint8]:
        return np.zeros(size, np.uint8)

    def free_host(self, memory: NDArray[np.uint8]) -> None:
        pass

    def load(self, kernel: Kernel, image: bytes) -> None:
        if kernel.symbol in self.refused:
            raise ModelError(f"{self.name}: loading {kernel.symbol}: no")
        assert kernel.symbol not in self.loaded
        self.loaded.append(kernel.symbol)

    def prepare(self, operations: Sequence[Operation]) -> _Program:
        for operation in operations:
            assert isinstance(operation, KernelLaunch) and operation.kernel.symbol in self.loaded
            assert len(operation.arguments) == operation.kernel.arguments
            assert all(self.owns(address, 1) for address in operation.arguments)
        return _Program(self, operations)

    def copy(self, copy: Copy, stream: int) -> None:
        assert self.owns(copy.destination, copy.bytes)
        assert copy.direction == "to_device" or self.owns(copy.source, copy.bytes)

    def zero(self, address: int, size: int, stream: int) -> None:
        assert self.owns(address, size)

    def synchronize(self, stream: int) -> None:
        pass

    def create_event(self) -> int:
        self._events.append(-1.0)
        return len(self._events) - 1

    def record(self, event: int, stream: int) -> None:
        self._events[event] = self._now

    def wait(self, event: int) -> None:
        pass

    def nanoseconds(self, start: int, end: int) -> int:
        return round((self._events[end] - self._events[start]) * 1e9)

    def close(self) -> None:
        self.closed = True

    def owns(self, address: int, size: int) -> bool:
        """Whether bytes lie in memory that was allocated."""
        return any(a <= address and address + size <= a + s for a, s in self.allocated)

    def run(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            assert isinstance(operation, KernelLaunch)
            self._now += self.times(self.sources[operation.kernel.symbol])
        self.measured += dict.fromkeys(o.kernel.symbol for o in operations if isinstance(o, KernelLaunch))


class _Program:
    def __init__(self, gpu: FakeGpu, operations: Sequence[Operation]) -> None:
        self.gpu = gpu
        self.operations = operations

    def run(self, stream: int, first: int = 0, last: int | None = None) -> None:
        self.gpu.run(self.operations[first:last])

    def replay(self, stream: int) -> None:
        assert stream == 7
        self.gpu.run(self.operations)


class FakeCompiler:
    """In place of `compile_sources`: `sources` are what was compiled, by symbol; `calls` how often it was asked.

    `broken`: symbols that do not compile; `shared`: bytes of shared memory of others than 0.
    """

    def __init__(self) -> None:
        self.sources: dict[str, KernelSource] = {}
        self.calls: list[str] = []
        self.broken: set[str] = set()
        self.shared: dict[str, int] = {}

    def __call__(
        self, sources: Sequence[KernelSource], variant: GpuVariant, failures: dict[str, str] | None = None
    ) -> dict[str, Compiled]:
        self.calls.append(variant.name)
        self.sources |= {s.name: s for s in sources}
        assert failures is not None
        failures.update({s.name: "ptxas is not amused" for s in sources if s.name in self.broken})
        return {s.name: self._made(s) for s in sources if s.name not in self.broken}

    def _made(self, source: KernelSource) -> Compiled:
        count, shared = len(source.arguments), self.shared.get(source.name, 0)
        return Compiled(b"\x7fELF", b"", source.name, 32 * source.num_warps, shared, count, True, 1, 0, 0, 1, None, 0.0)


def constant(source: KernelSource, name: str) -> Any:
    """A constant of a kernel."""
    return dict(source.constants)[name]
