"""A model of costs, to be held against what is measured: the bound, and a fixed time for each kernel's boundary.

Nothing here was measured by this program. The constants' sources stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.gpu.bounds import Shape, bound, row_bytes, row_flops
from benchmarks.gpu.rows import Row

CEILINGS = {"copy_bandwidth": 4.3e12, "matrix_rate": 788e12}
"""Of an H200, measured by others: a copy between buffers, counting both; 8192³ in bf16, random."""
DEPENDENT_BOUNDARY, PLAIN_BOUNDARY = 0.8e-6, 2.8e-6
"""Seconds between kernels of a graph: where the next one starts early and fetches weights meanwhile, and where not.
Assumed, from 1.3 µs a launch in a graph on an H100 (published) and 1.5 µs for a kernel's end and the next's ramp."""
PREFILL_SHARE = 0.6
"""Of the matrix rate in prefill. A guess."""
KERNELS = {"decode": (5, 5), "prefill": (7, 6)}
"""Kernels of a step: for each layer, and the rest."""


@dataclass(frozen=True)
class Prediction:
    """Seconds: the bound; the step with early starts (`expected`), and without (`worst`)."""

    bound: float
    expected: float
    worst: float


def predict(row: Row) -> Prediction | None:
    """What the model says of a row; None for what it does not cover."""
    if row.kind == "first-token":
        return None
    shape = Shape.read(row.setup.config)
    limit = bound(row_bytes(row, shape), row_flops(row, shape), CEILINGS)
    each, rest = KERNELS[row.entry]
    kernels = each * shape.layers + rest
    busy = limit / PREFILL_SHARE if row.kind == "prefill" else limit
    return Prediction(limit, busy + kernels * DEPENDENT_BOUNDARY, busy + kernels * PLAIN_BOUNDARY)


def print_predictions(rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """A Markdown table."""
    say("| row | GB | bound, ms | expected, ms | share | without early starts, ms | share |")
    say("|---|---|---|---|---|---|---|")
    for row in rows:
        found = predict(row)
        if found is not None and row.peer is None:
            moved = row_bytes(row, Shape.read(row.setup.config)) / 1e9
            say(
                f"| {row.name} | {moved:.2f} | {found.bound * 1e3:.2f} | {found.expected * 1e3:.2f}"
                f" | {found.bound / found.expected:.0%} | {found.worst * 1e3:.2f} | {found.bound / found.worst:.0%} |"
            )
