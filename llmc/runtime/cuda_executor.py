"""Runs a package's steps on a GPU: one region of inputs, one graph for each size of step, one call to replay it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batch import Batch, StepOutput
from .cuda_api import OUT_OF_MEMORY, DriverError
from .cuda_driver import Copy, Device, KernelLaunch, Operation, Program, address_of
from .cuda_kernels import Kernel
from .cuda_memory import (
    InputLayout,
    aligned,
    input_layout,
    load_weights,
    out_of_memory,
    plan_memory,
    words,
)
from .cuda_plan import Bucket, CudaLaunch, CudaPlan
from .errors import ModelError
from .plan import Buffer
from .timings import Profile

Int32 = NDArray[np.int32]


class CudaExecutor:
    """Executes the entries of a plan on a device that has loaded `kernels`; see `batch.Executor`.

    `weights` is a file of `weights_bytes` bytes; None: their memory is left as it is, for the caller to fill.
    `sequence_blocks` is how many blocks the longest sequence needs.
    `memory` says what of the device's memory is used for what. Raises `ModelError`; the caller then closes the device,
    else `close` does.
    """

    def __init__(
        self,
        plan: CudaPlan,
        kernels: Mapping[str, Kernel],
        device: Device,
        weights: Path | None,
        weights_bytes: int,
        vocab_size: int,
        sequence_blocks: int,
    ) -> None:
        self.lock = RLock()
        self.limits = plan.limits
        self.block_size = plan.block_size
        self.vocab_size = vocab_size
        self.entry_tokens: Mapping[str, tuple[int, int]] = {name: entry.tokens for name, entry in plan.entries.items()}
        self.samples_on_device = plan.samples
        self.plan, self.device = plan, device
        self._kernels = [kernels[symbol] for symbol in plan.kernels]
        self._sequence_blocks = sequence_blocks
        self.memory = plan_memory(plan, weights_bytes, vocab_size, sequence_blocks, device.memory(), device.name)
        self.groups, self.num_blocks = plan.groups, self.memory.blocks
        self._inputs: Int32
        self._chosen: Int32
        try:
            self._regions = self._allocate()
        except DriverError as error:
            if error.code == OUT_OF_MEMORY:
                raise out_of_memory(self.memory, device.name) from error
            raise
        stream = device.current_stream()
        if plan.tickets:  # kernels leave them as they find them
            device.zero(self._regions["tickets"], 4 * plan.tickets, stream)
        # What a block holds that was never written is multiplied by a probability of 0, so it must be finite.
        device.zero(self._states_region, self._states_bytes, stream)
        if weights is not None:
            load_weights(device, weights, weights_bytes, self._regions["weights"])
        self._buckets: dict[tuple[str, int], _PreparedBucket] = {}
        self._events: list[int] = []
        self._steps = 0
        self._failure = ""
        self._closed = False
        self._finalizer = weakref.finalize(self, device.close)
        # At the interpreter's exit the driver takes everything back itself, and may be gone already.
        self._finalizer.atexit = False

    def step(self, entry: str, batch: Batch, profile: Profile | None = None) -> StepOutput:
        """Run one step; see `batch.Executor`. Raises `ModelError` after `close`, and ever after the GPU has failed."""
        with self.lock, self._work():
            self._steps += 1
            bucket = self._bucket(entry, batch.dims[0])
            bucket.take(batch, self._inputs)
            stream = self.device.current_stream()
            if profile is None:
                bucket.program.replay(stream)
            else:
                self._run_timed(bucket, stream, batch, profile)
            outputs = batch.dims[3]
            greedy, chosen = self._chosen[:, :outputs].copy()
            logits = partial(self._logits, self._steps, outputs)
            return StepOutput(logits, greedy, chosen if self.samples_on_device else None)

    def trace(self, entry: str, batch: Batch) -> Iterator[Callable[[int, Any, tuple[int, ...]], NDArray[Any]]]:
        """Run one step launch by launch, to find the first that is wrong.

        After each launch gives a function that reads an argument: its number, dtype and shape -> a copy of the array.
        """
        with self.lock, self._work():
            self._steps += 1
            bucket = self._bucket(entry, batch.dims[0])
            bucket.take(batch, self._inputs)
            stream = self.device.current_stream()
            bucket.program.run(stream, 0, 1)
            for i, launch in enumerate(bucket.bucket.launches, 1):
                bucket.program.run(stream, i, i + 1)
                self.device.synchronize(stream)
                yield partial(self._read, bucket, launch)

    def copy_block(self, group: int, source: int, destination: int) -> None:
        """Copy a whole block of every state of a group of layers."""
        with self.lock, self._work():
            stream = self.device.current_stream()
            copies = [
                Copy("on_device", place + destination * s.block_bytes, place + source * s.block_bytes, s.block_bytes)
                for place, s in zip(self._states, self.plan.states, strict=True)
                if s.group == group
            ]
            self.device.prepare(copies).run(stream)
            self.device.synchronize(stream)

    def close(self) -> None:
        """Give the device back with all its memory."""
        with self.lock:
            self._closed = True
            self._buckets = {}
            self._inputs, self._chosen = np.zeros(0, np.int32), np.zeros((2, 0), np.int32)
            self._finalizer()

    def _allocate(self) -> dict[str, int]:
        """Take what the memory plan says; gives the addresses of regions by name."""
        memory, plan, allocate = self.memory, self.plan, self.device.allocate
        regions = {"weights": allocate(memory.weights or 1)}
        scratch = allocate(memory.arena + memory.workspace + memory.inputs + memory.outputs)
        column = aligned(4 * plan.limits.outputs)
        sizes = {
            "arena": memory.arena,
            "workspace": aligned(plan.workspace_bytes),
            "tickets": aligned(4 * plan.tickets),
            "inputs": memory.inputs,
            "greedy": column,
            "chosen": column,
            "logits": aligned(4 * plan.limits.outputs * self.vocab_size),
        }
        for name, size in sizes.items():
            regions[name] = scratch
            scratch += size
        self._states_bytes = memory.states + aligned(1) * len(plan.states) + 1
        place = self._states_region = allocate(self._states_bytes)
        self._states: list[int] = []
        for state in plan.states:
            self._states.append(place)
            place += aligned(memory.blocks[state.group] * state.block_bytes)
        self._inputs = self.device.allocate_host(memory.inputs).view(np.int32)
        self._chosen = self.device.allocate_host(2 * column).view(np.int32).reshape(2, -1)
        return regions

    @contextmanager
    def _work(self) -> Iterator[None]:
        """Around everything that the device does."""
        if self._closed:
            raise ModelError("the model is closed")
        if self._failure:
            raise ModelError(
                f"{self.device.name} can do no more for this model, as an earlier step failed ({self._failure}); "
                "end this process and load the model in a new one"
            )
        try:
            yield
        except DriverError as error:
            if error.code == OUT_OF_MEMORY:  # nothing has run, and it may go better later
                raise out_of_memory(self.memory, self.device.name) from error
            self._failure = str(error)
            raise

    def _bucket(self, entry: str, tokens: int) -> _PreparedBucket:
        """The smallest bucket that holds a step, made ready the first time that it is used."""
        described = self.plan.entries[entry]
        bucket = described.bucket(tokens)
        key = (entry, bucket.tokens)
        if key not in self._buckets:
            layout = input_layout(described, bucket, self._sequence_blocks, self.groups)
            addresses = [self._address(buffer, layout) for buffer in self.plan.buffers]
            greedy, inputs = self._regions["greedy"], self._regions["inputs"]
            operations: list[Operation] = [
                Copy("to_device", inputs, address_of(self._inputs), layout.bytes),
                *(
                    KernelLaunch(self._kernels[x.kernel], x.grid, tuple(addresses[a] for a in x.args))
                    for x in bucket.launches
                ),
                Copy("to_host", address_of(self._chosen), greedy, self._chosen.nbytes),
            ]
            self._buckets[key] = _PreparedBucket(bucket, layout, addresses, self.device.prepare(operations))
        return self._buckets[key]

    def _address(self, buffer: Buffer, layout: InputLayout) -> int:
        if buffer.kind == "state":
            return self._states[buffer.index]
        if buffer.kind in ("input", "dims"):
            return self._regions["inputs"] + 4 * layout.places[buffer.name or buffer.kind][0]
        region = {"param": "weights", "output": buffer.name}.get(buffer.kind, buffer.kind)
        return self._regions[region] + buffer.offset

    def _logits(self, step: int, outputs: int) -> NDArray[np.float32]:
        """The rows of logits of the last step, if it is still the one that was meant."""
        with self.lock, self._work():
            if step != self._steps:
                raise ModelError("these logits are gone: they were of an earlier step and must be read before the next")
            return self._fetch(self._regions["logits"], np.float32, (outputs, self.vocab_size))

    def _read(self, bucket: _PreparedBucket, launch: CudaLaunch, place: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        """A copy of what a launch's argument points to."""
        return self._fetch(bucket.addresses[launch.args[place]], dtype, shape)

    def _fetch(self, address: int, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        memory = np.empty(shape, dtype)
        stream = self.device.current_stream()
        self.device.copy(Copy("to_host", int(memory.ctypes.data), address, memory.nbytes), stream)
        self.device.synchronize(stream)
        return memory

    def _run_timed(self, bucket: _PreparedBucket, stream: int, batch: Batch, profile: Profile) -> None:
        """The step without its graph, with a mark after each launch: the launches do not overlap then."""
        launches, device = bucket.bucket.launches, self.device
        while len(self._events) <= len(launches):
            self._events.append(device.create_event())
        bucket.program.run(stream, 0, 1)
        device.record(self._events[0], stream)
        for i in range(1, len(launches) + 1):
            bucket.program.run(stream, i, i + 1)
            device.record(self._events[i], stream)
        bucket.program.run(stream, len(launches) + 1)
        device.synchronize(stream)
        times = [device.nanoseconds(self._events[i], self._events[i + 1]) for i in range(len(launches))]
        profile.add(bucket.bucket, self.plan.kernels, np.array(times, np.uint64), batch)


class _PreparedBucket:
    """A bucket with its program, its inputs' layout, and the address of every buffer of the plan."""

    def __init__(self, bucket: Bucket, layout: InputLayout, addresses: list[int], program: Program) -> None:
        self.bucket, self.layout, self.addresses, self.program = bucket, layout, addresses, program
        self._dims = words(layout, "dims")
        self._slices = {name: words(layout, name) for name in layout.places if name != "dims"}

    def take(self, batch: Batch, inputs: Int32) -> None:
        """Put a batch's inputs where the step's first copy reads them, and padding behind: slots of -1, else zeros."""
        dims = batch.dims
        inputs[self._dims] = dims
        for name, place in self._slices.items():
            target, values = inputs[place], batch.input(name)
            count = 0
            if values is not None:
                count = values.size
                # The device trusts what it is given, so what would write past an input must not reach it.
                assert count <= target.size, name
                target[:count] = values.reshape(-1)
            if not name.startswith("block_tables"):  # nobody reads a row that no token names, and this one is long
                slots = name.startswith("slot_mapping")
                target[count:] = -1 if slots else dims[0] if name == "query_start" else 0
