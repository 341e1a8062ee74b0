"""The compiled model as data: plan.json, with its buffers, kernels and the launches of every entry point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .document import Field, read_document

INPUTS = ("token_ids", "positions", "slot_mapping", "query_start", "block_tables", "logit_rows")
"""The int32 inputs of a step over one group of layers; see `batch.Batch` for their shapes."""

OUTPUTS = ("logits", "greedy")
SYMBOLS = ("tokens", "sequences", "max_blocks", "outputs")
"""What the int32 vector `dims`, which every kernel gets, holds, in this order."""

ITEM_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "u32": 4, "i16": 2, "u16": 2, "i8": 1, "u8": 1, "f8e4m3": 1}
ALIGNMENT = 64
MAX_GROUPS = 64
MAX_BYTES = 1 << 46
MAX_COUNT = 1 << 20
_MAX_COST = 1 << 62
_MAX_WINDOW = 1 << 30


@dataclass(frozen=True)
class Limits:
    """The largest step: new tokens, sequences, and rows of logits."""

    tokens: int
    sequences: int
    outputs: int


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose states share a block table: those that see a `window` of so many tokens, or (0) all of them."""

    name: str
    window: int = 0


FULL = LayerGroup("full")


@dataclass(frozen=True)
class StateSpec:
    """What outlives a step, in blocks: `[num_blocks, *block_shape]` of `dtype`; `group` is its layer group's number."""

    name: str
    dtype: str
    block_shape: tuple[int, ...]
    group: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return math.prod(self.block_shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Buffer:
    """What a kernel's argument points to: a place in the arena, in a task's private memory or in the weights, a state,
    an input or an output; on a GPU also the workspace, the tickets or `dims`."""

    kind: str
    name: str = ""
    offset: int = 0
    bytes: int = 0
    index: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel run. `flops` and `bytes`: (fixed, for each token, for each token of context), at one sequence; of the
    latter, no more than `window` where that is not 0.

    `barrier`: all tasks wait after it. `each`: in a step of few tokens every task runs it whole, for itself, into
    private buffers, and nobody waits.
    """

    kernel: int
    args: tuple[int, ...]
    barrier: bool
    each: bool
    node: str
    flops: tuple[int, int, int]
    bytes: tuple[int, int, int]
    window: int = 0


@dataclass(frozen=True)
class Entry:
    """An entry point: the bounds on its sizes, inclusive, and its launches in order."""

    name: str
    tokens: tuple[int, int]
    sequences: tuple[int, int]
    outputs: tuple[int, int]
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Plan:
    """A validated plan.

    `private_bytes` is what each task has of its own; in steps of up to `each_tokens` tokens all of them use it.
    """

    block_size: int
    arena_bytes: int
    private_bytes: int
    each_tokens: int
    limits: Limits
    groups: tuple[LayerGroup, ...]
    states: tuple[StateSpec, ...]
    buffers: tuple[Buffer, ...]
    kernels: tuple[str, ...]
    entries: Mapping[str, Entry]


def read_plan(path: Path, weights_bytes: int) -> Plan:
    """Read and validate plan.json; every offset lies inside the arena, a task's private memory or the weights.

    Plans of format version 2 have one group of layers. Raises `ModelError` for anything that is not as it should be.
    """
    return parse_plan(read_document(path), weights_bytes)


def parse_plan(document: Field, weights_bytes: int) -> Plan:
    """Validate a plan; see `read_plan`."""
    head = parse_head(document)
    private_bytes = document.key("private_bytes").integer(0, MAX_BYTES)
    each_tokens = document.key("each_tokens").integer(0, MAX_COUNT)
    sizes = {"arena": head.arena_bytes, "private": private_bytes, "param": weights_bytes}
    inputs = inputs_of(head.groups)
    buffers = tuple(parse_buffer(field, sizes, len(head.states), inputs) for field in document.key("buffers").items())
    kernels = tuple(field.text(256) for field in document.key("kernels").items())
    entries = {
        name: _entry(name, field, head.limits, len(kernels), buffers) for name, field in parse_entries(document).items()
    }
    return Plan(
        head.block_size,
        head.arena_bytes,
        private_bytes,
        each_tokens,
        head.limits,
        head.groups,
        head.states,
        buffers,
        kernels,
        entries,
    )


@dataclass(frozen=True)
class PlanHead:
    """What plans for all kinds of devices begin with."""

    block_size: int
    arena_bytes: int
    limits: Limits
    groups: tuple[LayerGroup, ...]
    states: tuple[StateSpec, ...]


def slot_inputs(groups: Sequence[LayerGroup]) -> tuple[str, ...]:
    """The names of every group's slot_mapping: of the first that alone, of the others with their own name behind."""
    return _page_inputs("slot_mapping", groups)


def table_inputs(groups: Sequence[LayerGroup]) -> tuple[str, ...]:
    """The names of every group's block_tables, likewise."""
    return _page_inputs("block_tables", groups)


def inputs_of(groups: Sequence[LayerGroup]) -> tuple[str, ...]:
    """The int32 inputs of a step over these groups of layers."""
    return (*INPUTS, *slot_inputs(groups)[1:], *table_inputs(groups)[1:])


def _page_inputs(name: str, groups: Sequence[LayerGroup]) -> tuple[str, ...]:
    return (name, *(f"{name}_{group.name}" for group in groups[1:]))


def parse_head(document: Field) -> PlanHead:
    """Validate what plans for all kinds of devices begin with."""
    symbols, limits = document.key("symbols"), document.key("limits")
    if symbols.value != list(SYMBOLS):
        symbols.fail(f"{list(SYMBOLS)}")
    groups = _groups(document.optional("groups"))
    return PlanHead(
        document.key("block_size").integer(1, 1 << 16),
        document.key("arena_bytes").integer(0, MAX_BYTES),
        Limits(**{name: limits.key(name).integer(1, MAX_COUNT) for name in ("tokens", "sequences", "outputs")}),
        groups,
        tuple(_state(field, len(groups)) for field in document.key("states").items()),
    )


def parse_entries(document: Field) -> dict[str, Field]:
    """The entry points by name; `decode` and `prefill` are among them."""
    entries = document.key("entries").members()
    for name in ("decode", "prefill"):
        if name not in entries:
            document.key("entries").fail(f"an entry point {name!r}")
    return entries


def _groups(field: Field | None) -> tuple[LayerGroup, ...]:
    if field is None:
        return (FULL,)
    groups = []
    for item in field.items():
        window = parse_window(item.key("window"))
        name = f"window_{window}" if window else FULL.name
        if item.key("name").value != name:
            item.key("name").fail(f"{name!r}, as its window is {window}")
        groups.append(LayerGroup(name, window))
    if not 0 < len(groups) <= MAX_GROUPS or len(set(groups)) < len(groups):
        field.fail(f"from 1 to {MAX_GROUPS} groups of layers, each with another window")
    return tuple(groups)


def _state(field: Field, groups: int) -> StateSpec:
    if field.key("kind").value != "paged_kv":
        field.key("kind").fail("'paged_kv', the only kind of state that this runtime knows")
    dtype = field.key("dtype").text(16)
    if dtype not in ITEM_BYTES:
        field.key("dtype").fail(f"one of {sorted(ITEM_BYTES)}")
    shape = tuple(item.integer(1, 1 << 24) for item in field.key("block_shape").items())
    if math.prod(shape) > 1 << 30:
        field.key("block_shape").fail("a block of at most 2^30 elements")
    group = field.optional("group")
    return StateSpec(field.key("name").text(), dtype, shape, group.integer(0, groups - 1) if group else 0)


def parse_buffer(
    field: Field,
    sizes: Mapping[str, int],
    states: int,
    inputs: Sequence[str] = INPUTS,
    outputs: Sequence[str] = OUTPUTS,
    whole: Sequence[str] = (),
) -> Buffer:
    """A buffer that lies inside what it is a part of. `sizes`: the bytes of regions that have parts; `whole`: the kinds
    that are regions on their own."""
    kind = field.key("kind").text(16)
    if kind in whole:
        return Buffer(kind)
    if kind in sizes:
        offset = field.key("offset").integer(0, sizes[kind])
        if offset % ALIGNMENT:
            field.key("offset").fail(f"a multiple of {ALIGNMENT}")
        name = field.key("name").text(1 << 16) if kind == "param" else ""
        return Buffer(kind, name, offset, field.key("bytes").integer(0, sizes[kind] - offset))
    if kind == "state":
        return Buffer(kind, index=field.key("index").integer(0, states - 1))
    known = {"input": inputs, "output": outputs}
    if kind not in known:
        field.key("kind").fail(f"one of {[*sizes, 'state', *known, *whole]}")
    if field.key("name").value not in known[kind]:
        field.key("name").fail(f"one of {list(known[kind])}")
    return Buffer(kind, field.key("name").value)


def _entry(name: str, field: Field, limits: Limits, kernels: int, buffers: tuple[Buffer, ...]) -> Entry:
    items = field.key("launches").items()
    launches = tuple(_launch(item, kernels, len(buffers)) for item in items)
    _check_each(items, launches, buffers)
    written = {buffers[a].name for launch in launches for a in launch.args if buffers[a].kind == "output"}
    for output in OUTPUTS:
        if output not in written:
            field.key("launches").fail(f"a launch that writes the output {output!r}")
    return Entry(name, *parse_bounds(field, limits), launches)


def _check_each(items: Sequence[Field], launches: Sequence[Launch], buffers: tuple[Buffer, ...]) -> None:
    """What every task does for itself touches nothing that all share but to read it; only that fills private buffers.

    A plan does not say which arguments a launch writes; but the first launch that names a buffer must fill it.
    """
    filled: set[int] = set()
    for item, launch in zip(items, launches, strict=True):
        private = {a for a in launch.args if buffers[a].kind == "private"}
        if launch.each and (not private or any(buffers[a].kind in ("state", "output") for a in launch.args)):
            item.key("each").fail("false for a launch that names a state, an output, or no private buffer")
        if not launch.each and private - filled:
            item.key("args").fail("private buffers that a launch with 'each' has filled")
        filled |= private


def parse_bounds(field: Field, limits: Limits) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The bounds of an entry's tokens, sequences and outputs; of the latter two those of the plan where it has none."""
    sequences, outputs = field.optional("sequences"), field.optional("outputs")
    return (
        _bounds(field.key("tokens"), limits.tokens),
        _bounds(sequences, limits.sequences) if sequences else (1, limits.sequences),
        _bounds(outputs, limits.outputs) if outputs else (1, limits.outputs),
    )


def _bounds(field: Field, most: int) -> tuple[int, int]:
    least_field, most_field = field.items(2)
    least = least_field.integer(1, most)
    return least, most_field.integer(least, most)


def _launch(field: Field, kernels: int, buffers: int) -> Launch:
    return Launch(
        kernel=field.key("kernel").integer(0, kernels - 1),
        args=tuple(item.integer(0, buffers - 1) for item in field.key("args").items()),
        barrier=field.key("barrier").boolean(),
        each=field.key("each").boolean(),
        node=field.key("node").text(),
        flops=parse_cost(field.key("flops")),
        bytes=parse_cost(field.key("bytes")),
        window=parse_window(field.optional("window")),
    )


def parse_window(field: Field | None) -> int:
    """A number of tokens; 0 for none."""
    return field.integer(0, _MAX_WINDOW) if field else 0


def parse_cost(field: Field) -> tuple[int, int, int]:
    """Operations or bytes: fixed, for each token, for each token of context."""
    fixed, token, context = (item.integer(-_MAX_COST, _MAX_COST) for item in field.items(3))
    return fixed, token, context
