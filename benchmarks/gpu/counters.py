"""What the hardware counted of a step's kernels (NVIDIA's ncu) beside what the plan says that they move.

ncu OPTIONS --log-file FILE.csv python3 -m benchmarks.gpu step FOLDER --rows ROW
python3 -m benchmarks.gpu counters FOLDER FILE.csv --rows ROW
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.bounds import plan_bytes
from benchmarks.gpu.rows import Row
from llmc.runtime.cuda_kernels import read_kernels
from llmc.runtime.cuda_plan import read_cuda_plan

TIME, READ, WRITTEN = "gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"
ISSUED = "smsp__issue_active.avg.pct_of_peak_sustained_active"
METRICS = (TIME, READ, WRITTEN, ISSUED)
OPTIONS = (
    "--profile-from-start off --clock-control none --cache-control none --csv --print-units base "
    f"--metrics {','.join(METRICS)}"
)
"""Of ncu: clocks as they are, caches as the kernel before leaves them, nanoseconds and bytes; few enough metrics that a
kernel need not run twice."""

HEAD = (
    "| kernel | launches | µs each | MB counted | MB moved | moved / counted | TB/s | issue slots in use |\n"
    "|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Planned:
    """A launch of the plan: its kernel's function, its node in the graph, and the bytes that it moves in this step."""

    function: str
    node: str
    bytes: int


@dataclass(frozen=True)
class Measured:
    """A launch as ncu saw it."""

    function: str
    metrics: Mapping[str, float]


def planned_launches(folder: Path, row: Row) -> list[Planned]:
    """The launches of a row's step, from its package in `folder`."""
    package = folder / row.setup.name
    manifest = json.loads((package / "manifest.json").read_text())
    (variant,) = manifest["target"]["variants"]
    kernels = read_kernels(package / variant["resources"])
    plan = read_cuda_plan(package / variant["plan"], manifest["files"][variant["weights"]]["bytes"], kernels)
    context = row.batch * row.context if row.kind == "decode" else 0
    return [
        Planned(
            kernels[plan.kernels[launch.kernel]].function,
            launch.node,
            plan_bytes([asdict(launch)], row.tokens, context, row.batch),
        )
        for launch in plan.entries[row.entry].bucket(row.tokens).launches
    ]


def read_counters(path: Path) -> list[Measured]:
    """The launches in a file of `ncu --csv`, in their order. Raises `ValueError` where it is none.

    Format: one line for each metric of each launch, after lines of ncu's own and of the program's.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        said = next((line for line in lines if line.startswith("==ERROR==")), 'no line begins with "ID"')
        raise ValueError(f"{path} is no output of 'ncu --csv': {said}")
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for line in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        try:
            value = float(line["Metric Value"].replace(",", ""))
        except (KeyError, AttributeError, ValueError):
            raise ValueError(f"{path}: launch {line.get('ID')} has no number for {line.get('Metric Name')}") from None
        found.setdefault(line["ID"], (line["Kernel Name"], {}))[1][line["Metric Name"]] = value
    return [Measured(name, metrics) for name, metrics in found.values()]


def compare(planned: Sequence[Planned], measured: Sequence[Measured]) -> str:
    """A Markdown table, one row for each kernel in the order of first use, and one for all of them.

    `measured` may stop early (ncu's --launch-count). Raises `ValueError` where its launches are not the plan's.
    """
    if not measured or len(measured) > len(planned):
        raise ValueError(f"ncu saw {len(measured)} launches, and the step has {len(planned)}")
    for number, (plan, seen) in enumerate(zip(planned, measured, strict=False)):
        if plan.function != seen.function:
            raise ValueError(f"launch {number} is {plan.function} in the plan, and ncu saw {seen.function}")
        missing = [metric for metric in METRICS if metric not in seen.metrics]
        if missing:
            raise ValueError(f"launch {number} lacks {', '.join(missing)}: run ncu with {OPTIONS}")
    pairs = list(zip(planned, measured, strict=False))
    functions = dict.fromkeys(plan.function for plan, _ in pairs)
    lines = [_line(name, [pair for pair in pairs if pair[0].function == name]) for name in functions]
    return "\n".join([HEAD, *lines, _line(f"all {len(pairs)} of {len(planned)}", pairs)])


def _line(name: str, pairs: Sequence[tuple[Planned, Measured]]) -> str:
    counted = sum(plan.bytes for plan, _ in pairs) / 1e6
    seconds = _sum(pairs, TIME) / 1e9
    moved = (_sum(pairs, READ) + _sum(pairs, WRITTEN)) / 1e6
    issued = sum(seen.metrics[ISSUED] * seen.metrics[TIME] for _, seen in pairs) / (seconds * 1e9)
    share = f"{moved / counted:.2f}" if counted else ""
    each = f"{1e6 * seconds / len(pairs):.1f}"
    return (
        f"| {name} | {len(pairs)} | {each} | {counted:.2f} | {moved:.2f} | {share} | {moved / seconds / 1e6:.2f} | "
        f"{issued:.0f} % |"
    )


def _sum(pairs: Iterable[tuple[Planned, Measured]], metric: str) -> float:
    return sum(seen.metrics[metric] for _, seen in pairs)
