"""Into how many parts decode attention cuts a context, and what memory the parts need."""

from __future__ import annotations

from llmc.backends.base import KernelSpec
from llmc.backends.triton.kernels.attention_parts import head_parts
from llmc.ir.target import GpuVariant

TILES_BYTES = 42 << 10
"""Shared memory that a program of decode attention takes, heads up to 128 wide: tiles of 128 tokens of 8 bits, or 64 of
16, of which one or two are on their way; twice as wide heads take 1.8 times as much."""

MOST_PROGRAMS = 3
"""Programs that a multiprocessor's 65,536 registers hold, of 128 threads and up to 168 registers each."""

LEAST_TOKENS = 256
"""Tokens of a split at least: below that, starting it and adding its sums to the others' is most of its work."""

MOST_SPLITS = 64
"""The last to arrive adds up this many parts, one after another."""


def programs(variant: GpuVariant) -> int:
    """Programs of decode attention that a multiprocessor runs at once."""
    return min(MOST_PROGRAMS, variant.shared_bytes // TILES_BYTES)


def splits(sequences: int, num_kv_heads: int, longest: int, variant: GpuVariant) -> int:
    """Splits of every context in a step of so many sequences, of at most `longest` tokens each: as many as fill the
    chip once, as splits of `LEAST_TOKENS` tokens allow."""
    room = programs(variant) * variant.multiprocessors // (sequences * num_kv_heads)
    return max(1, min(room, longest // LEAST_TOKENS, MOST_SPLITS))


def grid(spec: KernelSpec, sequences: int) -> tuple[int, int, int]:
    """The grid of a spec of `attention_decode` for so many sequences."""
    parameters = dict(spec.parameters)
    return sequences, parameters["num_kv_heads"], parameters["splits"]


def workspace_bytes(spec: KernelSpec, sequences: int) -> int:
    """Bytes of workspace of a spec of `attention_decode`: for each program the sums, largest score and total of each
    head of its group, f32, the latter two padded to 64 bytes."""
    parameters = dict(spec.parameters)
    if parameters["splits"] == 1:
        return 0
    group = parameters["num_heads"] // parameters["num_kv_heads"]
    unit: int = group * sum(head_parts(parameters["head_dim"])) + (2 * group + 15) // 16 * 16
    return int(4 * unit * sequences * parameters["num_kv_heads"] * int(parameters["splits"]))


def tickets(spec: KernelSpec, sequences: int) -> int:
    """Tickets (i32) of a spec of `attention_decode`: one for each sequence and kv head."""
    parameters = dict(spec.parameters)
    return 0 if parameters["splits"] == 1 else int(sequences * parameters["num_kv_heads"])
