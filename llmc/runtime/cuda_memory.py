"""What a model takes of a GPU's memory, decided before anything is taken; a step's inputs; the weights' way there."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .batch import SAMPLING_WORDS
from .cuda_driver import ALIGNMENT, Copy, Device, address_of
from .cuda_plan import Bucket, CudaEntry, CudaPlan
from .errors import ModelError
from .kv_cache import most_blocks
from .plan import FULL, LayerGroup, slot_inputs, table_inputs

RESERVED_SHARE, RESERVED_LEAST = 0.05, 512 << 20
"""What stays free for graphs, for code and for others: this share of the free memory, and at least so many bytes."""
STAGING = 32 << 20
"""Bytes of each of the two pinned buffers through which the weights go."""

_MAX_STATE_ELEMENTS = (1 << 31) - 1
"""Kernels index a state with int32."""


@dataclass(frozen=True)
class InputLayout:
    """Where a bucket's inputs lie in the one region that is copied for a step: name -> (first word, words) of i32."""

    places: dict[str, tuple[int, int]]
    bytes: int


def input_layout(
    entry: CudaEntry, bucket: Bucket, sequence_blocks: int, groups: Sequence[LayerGroup] = (FULL,)
) -> InputLayout:
    """The layout for the largest step of a bucket; every input begins at a multiple of `ALIGNMENT` bytes."""
    tokens = bucket.tokens
    sequences, outputs = min(tokens, entry.sequences[1]), min(tokens, entry.outputs[1])
    words = {
        "dims": 4,
        **dict.fromkeys(("token_ids", "positions", *slot_inputs(groups)), tokens),
        "query_start": sequences + 1,
        "logit_rows": outputs,
        "sampling": outputs * SAMPLING_WORDS,
        **dict.fromkeys(table_inputs(groups), sequences * sequence_blocks),
    }
    places, at = {}, 0
    for name, count in words.items():
        places[name] = (at, count)
        at += aligned(4 * count) // 4
    return InputLayout(places, 4 * at)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a device: `free` before the model is loaded, and what each part takes.

    `states` are keys and values, in `blocks` blocks for each group of layers; one sequence of the longest needs
    `longest` bytes of them.
    """

    total: int
    free: int
    weights: int
    arena: int
    workspace: int
    inputs: int
    outputs: int
    reserve: int
    states: int
    blocks: tuple[int, ...]
    longest: int

    def info(self) -> dict[str, Any]:
        """For `model.info`: bytes, and the numbers of blocks."""
        return asdict(self)


def plan_memory(
    plan: CudaPlan, weights: int, vocab_size: int, sequence_blocks: int, memory: tuple[int, int], device: str
) -> MemoryPlan:
    """Divide the device's memory, given as (free, total) bytes.

    Keys and values get what is left, at most what as many longest sequences need as run in one step. Raises
    `ModelError` with all the numbers where not even one longest sequence fits.
    """
    free, total = memory
    layouts = [input_layout(e, b, sequence_blocks, plan.groups) for e in plan.entries.values() for b in e.buckets]
    fixed = {
        "weights": aligned(weights),
        "arena": aligned(plan.arena_bytes),
        "workspace": aligned(plan.workspace_bytes) + aligned(4 * plan.tickets),
        "inputs": max(layout.bytes for layout in layouts),
        "outputs": aligned(4 * plan.limits.outputs * vocab_size) + 2 * aligned(4 * plan.limits.outputs),
        "reserve": max(int(RESERVED_SHARE * free), RESERVED_LEAST),
    }
    left = free - sum(fixed.values()) - ALIGNMENT * len(plan.states)
    block_bytes = [sum(s.block_bytes for s in plan.states if s.group == i) for i in range(len(plan.groups))]
    least = _blocks_for(plan, 1, sequence_blocks)
    blocks = _divide(plan, max(0, left), sequence_blocks, block_bytes)
    found = MemoryPlan(
        total=total,
        free=free,
        **fixed,
        states=_product(blocks, block_bytes),
        blocks=blocks,
        longest=_product(least, block_bytes),
    )
    if any(have < need for have, need in zip(blocks, least, strict=True)) or found.states > left:
        raise ModelError(
            f"{device}: not enough memory: {_shown(found)}; free memory on the GPU, or compile with a smaller --quant "
            "or --max-sequence-length"
        )
    return found


def _blocks_for(plan: CudaPlan, sequences: int, sequence_blocks: int) -> tuple[int, ...]:
    """The blocks that so many of the longest sequences need in each group of layers."""
    tokens, size = plan.limits.tokens, plan.block_size
    return tuple(most_blocks(group, sequences, sequence_blocks, tokens, size) for group in plan.groups)


def _divide(plan: CudaPlan, left: int, sequence_blocks: int, block_bytes: Sequence[int]) -> tuple[int, ...]:
    """The number of blocks of each group of layers, given the bytes of a block of each and how many are left in all.

    Groups with a window get theirs for as many sequences as fit into half of what is left, or for more where all groups
    have room for more of the longest: these are rare, while a window is soon full. A group without one gets the rest.
    """
    of_windows = [size if group.window else 0 for group, size in zip(plan.groups, block_bytes, strict=True)]
    most = _blocks_for(plan, plan.limits.sequences, sequence_blocks)
    blocks = least = _blocks_for(plan, 1, sequence_blocks)
    for_windows = left - _product(least, block_bytes) + _product(least, of_windows)
    for sequences in range(2, plan.limits.sequences + 1):
        needed = _blocks_for(plan, sequences, sequence_blocks)
        if _product(needed, of_windows) <= min(left // 2, for_windows) or _product(needed, block_bytes) <= left:
            blocks = needed
    rest = max(0, left - _product(blocks, of_windows))
    found = []
    for number, group in enumerate(plan.groups):
        elements = max((math.prod(s.block_shape) for s in plan.states if s.group == number), default=1)
        count = blocks[number] if group.window else most[number]
        if not group.window and block_bytes[number]:
            count = min(count, rest // block_bytes[number])
        found.append(min(count, _MAX_STATE_ELEMENTS // elements))
    return tuple(found)


def _product(blocks: Sequence[int], sizes: Sequence[int]) -> int:
    """Bytes of blocks."""
    return sum(map(operator.mul, blocks, sizes))


def out_of_memory(plan: MemoryPlan, device: str) -> ModelError:
    """The error where the driver refuses memory that was free a moment ago."""
    return ModelError(
        f"{device}: out of memory although it was planned: {_shown(plan)}; is another process taking it meanwhile?"
    )


def load_weights(device: Device, path: Path, size: int, address: int) -> None:
    """Copy `size` bytes of a file to device memory: while one part is copied the next is read. Waits for the last.

    Raises `ModelError` where the file cannot be read or is shorter; the device is then of no more use.
    """
    stream = device.current_stream()
    staging = [device.allocate_host(max(1, min(size, STAGING))) for _ in range(2)]
    events = [device.create_event() for _ in staging]
    try:
        with path.open("rb", buffering=0) as file:
            for part, done in enumerate(range(0, size, STAGING)):
                buffer, event = staging[part % 2], events[part % 2]
                device.wait(event)  # the copy that last read this buffer
                count = min(STAGING, size - done)
                view = buffer.data[:count]
                while view:
                    taken = file.readinto(view)
                    if not taken:
                        raise ModelError(f"{path} is too short: expected {size} bytes; the package is damaged")
                    view = view[taken:]
                device.copy(Copy("to_device", address + done, address_of(buffer), count), stream)
                device.record(event, stream)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    device.synchronize(stream)
    for buffer in staging:
        device.free_host(buffer)


def aligned(size: int) -> int:
    """The least multiple of `ALIGNMENT` that is not less."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _shown(plan: MemoryPlan) -> str:
    parts = ", ".join(
        f"{name} {_in_megabytes(getattr(plan, name))}"
        for name in ("weights", "arena", "workspace", "inputs", "outputs", "reserve")
    )
    return (
        f"{_in_megabytes(plan.free)} of {_in_megabytes(plan.total)} are free, and the model needs {parts}, "
        f"and {_in_megabytes(plan.longest)} for the keys and values of one sequence of the longest"
    )


def _in_megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 10**10 else f"{size / 1e9:.2f} GB"


def words(layout: InputLayout, name: str) -> slice:
    """The part of a region of i32 that an input takes."""
    start, count = layout.places[name]
    return slice(start, start + count)
