"""Runs a package's steps on the processor: arena, states, inputs and outputs, and one native call for each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .batch import Batch, StepOutput
from .errors import ModelError
from .kv_cache import most_blocks
from .memory import allocate, copy_to_huge_pages, map_file, reserve
from .native import BARRIER, EACH, LAUNCH, NativeLibrary
from .plan import Buffer, Entry, Launch, Plan, slot_inputs, table_inputs
from .timings import Profile

_MAX_STATE_ELEMENTS = 1 << 31
"""Kernels index a state with int32."""
_PAGE = 4096


@dataclass(frozen=True)
class _LaunchTable:
    """An entry's C `Launch` records and its argument pointers by address; `keep` owns both.

    `args` has `stride` pointers for each of the pool's threads.
    """

    count: int
    launches: int
    args: int
    stride: int
    keep: tuple[NDArray[Any], NDArray[Any]]


class NativeExecutor:
    """Executes the entries of a plan; see `batch.Executor`.

    `sequence_blocks` is how many blocks the longest sequence needs. Memory: the arena, inputs and outputs of the
    largest step; private memory for each thread, of which all but the first touch what a step of `each_tokens` needs;
    states with room for as many longest sequences as a batch holds (see `most_blocks`), reserved but not touched (fewer
    where kernels could not index them or the system refuses so much address space). Raises `ModelError`.
    """

    def __init__(
        self,
        plan: Plan,
        library: NativeLibrary,
        weights: Path,
        weights_bytes: int,
        vocab_size: int,
        sequence_blocks: int,
        huge_pages: bool = False,
    ) -> None:
        self.lock = RLock()
        self.limits = plan.limits
        self.samples_on_device = False
        self.block_size = plan.block_size
        self.vocab_size = vocab_size
        self.entry_tokens: Mapping[str, tuple[int, int]] = {name: entry.tokens for name, entry in plan.entries.items()}
        self.library = library
        self.plan = plan
        self.weights = map_file(weights, weights_bytes)
        if huge_pages:
            self.weights = copy_to_huge_pages(self.weights, library.copy)
        self.groups = plan.groups
        self.num_blocks, self._states = _allocate_states(plan, sequence_blocks)
        self._arena = reserve(plan.arena_bytes)
        # One region for each task, on pages of its own: two processors never write to one line.
        self._private = reserve(library.threads * _pages(plan.private_bytes)).reshape(library.threads, -1)
        self._inputs, self._outputs = _allocate_ends(plan, vocab_size, sequence_blocks)
        self._dims = allocate((4,), np.int32)
        self._kernel_addresses = library.kernel_addresses(plan.kernels)
        # Addresses are taken once: asking an array for its own costs a microsecond each time.
        self._kernels, self._dims_address = _address_of(self._kernel_addresses), _address_of(self._dims)
        self._tables = {name: self._launch_table(entry) for name, entry in plan.entries.items()}
        self._closed = False

    def step(self, entry: str, batch: Batch, profile: Profile | None = None) -> StepOutput:
        """Run one step; see `batch.Executor`. Raises `ModelError` after `close` or when a kernel fails."""
        with self.lock:
            if self._closed:
                raise ModelError("the model is closed")
            dims = batch.dims
            self._take(batch)
            table = self._tables[entry]
            nanoseconds = np.zeros(table.count, np.uint64) if profile is not None else None
            self._walk(table, table.launches, table.count, self.plan.each_tokens, _address_of(nanoseconds))
            if profile is not None and nanoseconds is not None:
                profile.add(self.plan.entries[entry], self.plan.kernels, nanoseconds, batch)
            return StepOutput(self._outputs["logits"][: dims[3]], self._outputs["greedy"][: dims[3]])

    def trace(self, entry: str, batch: Batch) -> Iterator[Callable[[int, Any, tuple[int, ...]], NDArray[Any]]]:
        """Run one step launch by launch, to find the first that is wrong.

        After each launch gives a function that reads an argument: its number, dtype and shape -> a copy of the array.
        Tasks share all launches, so that what they write is in one place.
        """
        with self.lock:
            self._take(batch)
            table = self._tables[entry]
            for i, launch in enumerate(self.plan.entries[entry].launches):
                self._walk(table, table.launches + i * LAUNCH.itemsize, 1, 0, 0)
                yield partial(self._read, launch)

    def _walk(self, table: _LaunchTable, launches: int, count: int, each_tokens: int, nanoseconds: int) -> None:
        dims, args, stride = self._dims_address, table.args, table.stride
        self.library.step(launches, count, self._kernels, args, stride, each_tokens, dims, nanoseconds)

    def _read(self, launch: Launch, place: int, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """A copy of what a launch's argument points to."""
        buffer = self.plan.buffers[launch.args[place]]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory: NDArray[Any] = self._memory(buffer)[buffer.offset : buffer.offset + size].view(dtype)
        return memory.reshape(shape).copy()

    def _take(self, batch: Batch) -> None:
        """Put a batch's inputs where the kernels read them."""
        for name, memory in self._inputs.items():
            values = batch.input(name)
            # The native step trusts what it is given, so what would write past a buffer must not reach it.
            assert values is not None and values.size <= memory.size, name
            memory[: values.size] = values.reshape(-1)
        assert batch.dims[3] <= self.limits.outputs
        self._dims[:] = batch.dims

    def copy_block(self, group: int, source: int, destination: int) -> None:
        """Copy a whole block of every state of a group of layers."""
        for spec, state in zip(self.plan.states, self._states, strict=True):
            if spec.group == group:
                state[destination] = state[source]

    def close(self) -> None:
        """End the threads and let go of all memory."""
        with self.lock:
            self._closed = True
            self.library.close()
            self._states, self._inputs, self._outputs, self._tables = [], {}, {}, {}
            self._arena = self.weights = np.zeros(0, np.uint8)
            self._private = np.zeros((1, 0), np.uint8)

    def _launch_table(self, entry: Entry) -> _LaunchTable:
        counts = [len(launch.args) for launch in entry.launches]
        launches = np.zeros(len(counts), LAUNCH)
        launches["kernel"] = [launch.kernel for launch in entry.launches]
        launches["arg_count"] = counts
        launches["first_arg"] = np.cumsum([0, *counts])[:-1]
        launches["flags"] = [BARRIER * launch.barrier | EACH * launch.each for launch in entry.launches]
        addresses = np.array([self._address(buffer) for buffer in self.plan.buffers], np.uint64)
        private = np.array([buffer.kind == "private" for buffer in self.plan.buffers])
        named = np.array([a for launch in entry.launches for a in launch.args], np.intp)
        regions = np.arange(self.library.threads, dtype=np.uint64) * np.uint64(self._private.shape[1])
        args = np.ascontiguousarray((addresses + regions[:, None] * private)[:, named], np.uint64)
        return _LaunchTable(len(launches), _address_of(launches), _address_of(args), named.size, (launches, args))

    def _address(self, buffer: Buffer) -> int:
        return _address_of(self._memory(buffer)) + buffer.offset

    def _memory(self, buffer: Buffer) -> NDArray[np.uint8]:
        """The memory in which a buffer lies, as bytes; of what each task has of its own, the first's."""
        places: dict[str, Callable[[], NDArray[Any]]] = {
            "arena": lambda: self._arena,
            "private": lambda: self._private[0],
            "param": lambda: self.weights,
            "state": lambda: self._states[buffer.index],
            "input": lambda: self._inputs[buffer.name],
            "output": lambda: self._outputs[buffer.name],
        }
        return places[buffer.kind]().reshape(-1).view(np.uint8)


def _allocate_states(plan: Plan, sequence_blocks: int) -> tuple[tuple[int, ...], list[NDArray[np.uint8]]]:
    """The number of blocks of each group of layers, and each state as u8[num_blocks, block bytes]."""
    sequences = plan.limits.sequences
    counts = _block_counts(plan, sequence_blocks, sequences)
    states = _reserve_blocks(plan, counts)
    while states is None and sequences > 1:
        sequences //= 2
        counts = _block_counts(plan, sequence_blocks, sequences)
        states = _reserve_blocks(plan, counts)
    if states is None:
        need = sum(counts[state.group] * state.block_bytes for state in plan.states)
        raise ModelError(
            f"cannot reserve {need} bytes for keys and values; compile for a shorter --max-sequence-length"
        )
    return counts, states


def _block_counts(plan: Plan, sequence_blocks: int, sequences: int) -> tuple[int, ...]:
    """The blocks that so many of the longest sequences need in each group of layers, as far as kernels index them."""
    counts = []
    for number, group in enumerate(plan.groups):
        elements = max((int(np.prod(s.block_shape)) for s in plan.states if s.group == number), default=1)
        most = most_blocks(group, sequences, sequence_blocks, plan.limits.tokens, plan.block_size)
        counts.append(min(most, (_MAX_STATE_ELEMENTS - 1) // elements))
    return tuple(counts)


def _pages(size: int) -> int:
    """Bytes of the whole pages that hold `size` bytes."""
    return -(-size // _PAGE) * _PAGE


def _address_of(array: NDArray[Any] | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


def _reserve_blocks(plan: Plan, counts: Sequence[int]) -> list[NDArray[np.uint8]] | None:
    try:
        return [reserve(counts[s.group] * s.block_bytes).reshape(-1, s.block_bytes) for s in plan.states]
    except ModelError:
        return None


def _allocate_ends(
    plan: Plan, vocab_size: int, sequence_blocks: int
) -> tuple[dict[str, NDArray[np.int32]], dict[str, NDArray[Any]]]:
    """The buffers of a step's inputs (flat) and outputs, each at its greatest size."""
    limits = plan.limits
    sizes = {
        **dict.fromkeys(("token_ids", "positions", *slot_inputs(plan.groups)), limits.tokens),
        "query_start": limits.sequences + 1,
        "logit_rows": limits.outputs,
        **dict.fromkeys(table_inputs(plan.groups), limits.sequences * sequence_blocks),
    }
    outputs = {
        "logits": allocate((limits.outputs, vocab_size), np.float32),
        "greedy": allocate((limits.outputs,), np.int32),
    }
    return {name: allocate((size,), np.int32) for name, size in sizes.items()}, outputs
