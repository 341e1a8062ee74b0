"""A model compiled for a GPU as data: plan-<arch>.json, the launches of every entry point for each size of step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .cuda_kernels import Kernel
from .document import Field, read_document
from .plan import (
    MAX_BYTES,
    MAX_COUNT,
    OUTPUTS,
    Buffer,
    LayerGroup,
    Limits,
    StateSpec,
    inputs_of,
    parse_bounds,
    parse_buffer,
    parse_cost,
    parse_entries,
    parse_head,
    parse_window,
)

CUDA_OUTPUTS = (*OUTPUTS, "chosen")

_WHOLE = ("workspace", "tickets", "dims")
_MAX_GRID = ((1 << 31) - 1, (1 << 16) - 1, (1 << 16) - 1)
_MAX_BUCKETS = 256


@dataclass(frozen=True)
class CudaLaunch:
    """One kernel run on a grid of blocks; `args` are numbers of buffers. Costs as in `plan.Launch`."""

    kernel: int
    grid: tuple[int, int, int]
    args: tuple[int, ...]
    node: str
    flops: tuple[int, int, int]
    bytes: tuple[int, int, int]
    window: int = 0


@dataclass(frozen=True)
class Bucket:
    """The launches for steps of at most `tokens` tokens. `name` is its entry point's."""

    name: str
    tokens: int
    launches: tuple[CudaLaunch, ...]


@dataclass(frozen=True)
class CudaEntry:
    """An entry point: the bounds on its sizes, inclusive, and its buckets, the smallest first."""

    name: str
    tokens: tuple[int, int]
    sequences: tuple[int, int]
    outputs: tuple[int, int]
    buckets: tuple[Bucket, ...]

    def bucket(self, tokens: int) -> Bucket:
        """The smallest that holds a step of so many tokens."""
        return next(bucket for bucket in self.buckets if bucket.tokens >= tokens)


@dataclass(frozen=True)
class CudaPlan:
    """A validated plan. `tickets` counts int32; `samples`: whether every step draws the next tokens itself."""

    block_size: int
    arena_bytes: int
    workspace_bytes: int
    tickets: int
    limits: Limits
    groups: tuple[LayerGroup, ...]
    states: tuple[StateSpec, ...]
    buffers: tuple[Buffer, ...]
    kernels: tuple[str, ...]
    entries: Mapping[str, CudaEntry]
    samples: bool


def read_cuda_plan(path: Path, weights_bytes: int, kernels: Mapping[str, Kernel]) -> CudaPlan:
    """Read and validate a plan: every offset lies inside its region, every launch gives its kernel what it takes.

    Raises `ModelError` for anything that is not as it should be.
    """
    return parse_cuda_plan(read_document(path), weights_bytes, kernels)


def parse_cuda_plan(document: Field, weights_bytes: int, kernels: Mapping[str, Kernel]) -> CudaPlan:
    """Validate a plan; see `read_cuda_plan`."""
    head = parse_head(document)
    sizes = {"arena": head.arena_bytes, "param": weights_bytes}
    inputs = (*inputs_of(head.groups), "sampling")
    buffers = tuple(
        parse_buffer(field, sizes, len(head.states), inputs, CUDA_OUTPUTS, _WHOLE)
        for field in document.key("buffers").items()
    )
    symbols = tuple(_symbol(field, kernels) for field in document.key("kernels").items())
    entries = {
        name: _entry(name, field, head.limits, [kernels[symbol] for symbol in symbols], buffers)
        for name, field in parse_entries(document).items()
    }
    buckets = [bucket for entry in entries.values() for bucket in entry.buckets]
    return CudaPlan(
        head.block_size,
        head.arena_bytes,
        document.key("workspace_bytes").integer(0, MAX_BYTES),
        document.key("tickets").integer(0, MAX_COUNT),
        head.limits,
        head.groups,
        head.states,
        buffers,
        symbols,
        entries,
        samples=all("chosen" in _written(bucket.launches, buffers) for bucket in buckets),
    )


def _symbol(field: Field, kernels: Mapping[str, Kernel]) -> str:
    symbol = field.text(256)
    if symbol not in kernels:
        field.fail("a kernel that the resources list")
    return symbol


def _entry(name: str, field: Field, limits: Limits, kernels: list[Kernel], buffers: tuple[Buffer, ...]) -> CudaEntry:
    bounds = parse_bounds(field, limits)
    items = field.key("buckets").items()
    if not 0 < len(items) <= _MAX_BUCKETS:
        field.key("buckets").fail(f"from 1 to {_MAX_BUCKETS} buckets")
    buckets = tuple(_bucket(name, item, kernels, buffers) for item in items)
    if any(a.tokens >= b.tokens for a, b in itertools.pairwise(buckets)) or buckets[-1].tokens < bounds[0][1]:
        field.key("buckets").fail(f"buckets of more and more tokens, up to {bounds[0][1]} or more")
    return CudaEntry(name, *bounds, buckets)


def _bucket(name: str, field: Field, kernels: list[Kernel], buffers: tuple[Buffer, ...]) -> Bucket:
    launches = tuple(_launch(item, kernels, len(buffers)) for item in field.key("launches").items())
    for output in OUTPUTS:
        if output not in _written(launches, buffers):
            field.key("launches").fail(f"a launch that writes the output {output!r}")
    return Bucket(name, field.key("tokens").integer(1, MAX_COUNT), launches)


def _written(launches: tuple[CudaLaunch, ...], buffers: tuple[Buffer, ...]) -> set[str]:
    """The outputs that launches name."""
    return {buffers[arg].name for launch in launches for arg in launch.args if buffers[arg].kind == "output"}


def _launch(field: Field, kernels: list[Kernel], buffers: int) -> CudaLaunch:
    kernel = field.key("kernel").integer(0, len(kernels) - 1)
    x, y, z = (item.integer(1, most) for item, most in zip(field.key("grid").items(3), _MAX_GRID, strict=True))
    args = field.key("args").items(kernels[kernel].arguments)
    return CudaLaunch(
        kernel=kernel,
        grid=(x, y, z),
        args=tuple(item.integer(0, buffers - 1) for item in args),
        node=field.key("node").text(),
        flops=parse_cost(field.key("flops")),
        bytes=parse_cost(field.key("bytes")),
        window=parse_window(field.optional("window")),
    )
