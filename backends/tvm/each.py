"""Launches that every task runs for itself when a step has few tokens, and where the values of a step then lie.

A norm of one row takes a microsecond; so does the barrier after it, and more when a thread is late. An `each` launch
has none: every task computes all rows into memory of its own ("private"), and what comes after reads its own copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from llmc.backends.base import Launch
from llmc.backends.tvm.selected import Selected
from llmc.ir.graph import StateInput
from llmc.ir.op import Value
from llmc.passes.plan_memory import MemoryPlan, allocate, largest_bytes, storage

EACH_KINDS = frozenset(
    (
        "embedding",
        "packed_embedding",
        "quantized_embedding",
        "quantize_tiles",
        "combine_splits",
        "rms_norm",
        "add_rms_norm",
        "layer_norm",
        "norm_heads",
        "add_layer_norm",
        "rotary_table",
        "dynamic_rotary_table",
        "gather_rows",
    )
)
"""Kinds of kernels whose arithmetic on a few rows costs less than a barrier."""

EACH_ELEMENTS = 4096
"""How many results of such a kernel, tokens times width, cost a task no more than a barrier would.

Measured with two threads and AVX2: an addition and RMS norm of 4 rows of 1024 took a task 1.1 microseconds, of which
sharing would have saved half; a barrier took 0.8 in decode steps of a small model.
"""

Intermediate = Callable[[Value], bool]
"""Whether a stored value only passes between launches."""


def runs_whole(chosen: Selected, results: Sequence[Value], intermediate: Intermediate) -> bool:
    """Whether every task may run a kernel for itself.

    Not when a single row of its results is too wide; nor when it writes an output, which is in one place; nor when it
    names a state: without a barrier after it, the next launch of a faster task may already write there.
    """
    roots = [storage(value) for value in chosen.arguments]
    return (
        chosen.spec.kind in EACH_KINDS
        and all(intermediate(storage(value)) and _width(value) <= EACH_ELEMENTS for value in results)
        and not any(isinstance(root.op, StateInput) for root in roots)
    )


def each_tokens(private: MemoryPlan) -> int:
    """Up to how many tokens of a step every task is to run such launches for itself; 0 where there are none."""
    return min((EACH_ELEMENTS // _width(value) for value in private.offsets), default=0)


def place(
    launches: Sequence[Launch], intermediate: Intermediate, sizes: Mapping[Value, int] | None = None
) -> tuple[MemoryPlan, MemoryPlan]:
    """The arena and the private memory of launches: intermediate values share each by their lifetimes.

    Private is what `each` launches write. `sizes` gives bytes by stored value, by default at the symbols' upper bounds.
    """
    shared: dict[Value, tuple[int, int]] = {}
    private: dict[Value, tuple[int, int]] = {}
    ends = _next_barriers(launches)
    for i, launch in enumerate(launches):
        for root in map(storage, launch.arguments):
            if not intermediate(root):
                continue
            if root in private or (root not in shared and launch.each):
                # A task walks its launches in order, and nobody else touches its private memory.
                private[root] = (private.get(root, (i, i))[0], i)
            else:
                shared[root] = (shared.get(root, (i, i))[0], ends[i])
    return _allocate(shared, sizes), _allocate(private, sizes)


def _next_barriers(launches: Sequence[Launch]) -> list[int]:
    """For each launch the first one, itself included, that ends with a barrier; the last one's is the step's end.

    Until that barrier a slow task may still read what the launch reads, while a fast one writes what comes next: so
    long must a shared value live.
    """
    ends = list(range(len(launches)))
    for i in reversed(range(len(launches) - 1)):
        if launches[i].each:
            ends[i] = ends[i + 1]
    return ends


def _width(value: Value) -> int:
    """Elements of a value for each token."""
    return prod(dim for dim in value.type.shape if isinstance(dim, int))


def _allocate(lifetimes: Mapping[Value, tuple[int, int]], sizes: Mapping[Value, int] | None) -> MemoryPlan:
    return allocate(lifetimes, sizes or {v: largest_bytes(v.type) for v in lifetimes})
