"""What a model takes of a GPU's memory, decided before anything is taken; a step's inputs; the weights' way there."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from .batch import SAMPLING_WORDS
from .cuda_driver import ALIGNMENT, Copy, Device, address_of
from .cuda_plan import Bucket, CudaEntry, CudaPlan
from .errors import ModelError

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


def input_layout(entry: CudaEntry, bucket: Bucket, sequence_blocks: int) -> InputLayout:
    """The layout for the largest step of a bucket; every input begins at a multiple of `ALIGNMENT` bytes."""
    tokens = bucket.tokens
    sequences, outputs = min(tokens, entry.sequences[1]), min(tokens, entry.outputs[1])
    words = {
        "dims": 4,
        **dict.fromkeys(("token_ids", "positions", "slot_mapping"), tokens),
        "query_start": sequences + 1,
        "logit_rows": outputs,
        "sampling": outputs * SAMPLING_WORDS,
        "block_tables": sequences * sequence_blocks,
    }
    places, at = {}, 0
    for name, count in words.items():
        places[name] = (at, count)
        at += aligned(4 * count) // 4
    return InputLayout(places, 4 * at)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a device: `free` before the model is loaded, and what each part takes.

    `states` are `blocks` blocks of keys and values; one sequence of the longest needs `longest` bytes of them.
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
    blocks: int
    longest: int

    def info(self) -> dict[str, int]:
        """For `model.info`: bytes, and the number of blocks."""
        return asdict(self)


def plan_memory(
    plan: CudaPlan, weights: int, vocab_size: int, sequence_blocks: int, memory: tuple[int, int], device: str
) -> MemoryPlan:
    """Divide the device's memory, given as (free, total) bytes.

    Keys and values get what is left, at most what as many longest sequences need as run in one step. Raises
    `ModelError` with all the numbers where not even one longest sequence fits.
    """
    free, total = memory
    block = sum(state.block_bytes for state in plan.states)
    elements = max((math.prod(state.block_shape) for state in plan.states), default=1)
    layouts = [input_layout(e, b, sequence_blocks) for e in plan.entries.values() for b in e.buckets]
    fixed = {
        "weights": aligned(weights),
        "arena": aligned(plan.arena_bytes),
        "workspace": aligned(plan.workspace_bytes) + aligned(4 * plan.tickets),
        "inputs": max(layout.bytes for layout in layouts),
        "outputs": aligned(4 * plan.limits.outputs * vocab_size) + 2 * aligned(4 * plan.limits.outputs),
        "reserve": max(int(RESERVED_SHARE * free), RESERVED_LEAST),
    }
    left = free - sum(fixed.values()) - ALIGNMENT * len(plan.states)
    most = min(plan.limits.sequences * sequence_blocks, _MAX_STATE_ELEMENTS // elements)
    blocks = min(most, max(0, left) // block) if block else most
    found = MemoryPlan(
        total=total,
        free=free,
        **fixed,
        states=blocks * block,
        blocks=blocks,
        longest=sequence_blocks * block,
    )
    if blocks < sequence_blocks or left < 0:
        raise ModelError(
            f"{device}: not enough memory: {_shown(found)}; free memory on the GPU, or compile with a smaller --quant "
            "or --max-sequence-length"
        )
    return found


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
