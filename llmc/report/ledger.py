"""Where the time of a compile went, printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from llmc.compile_report import CompileReport


def print_compile_report(report: CompileReport) -> None:
    """One line for each phase, then the package's sizes."""
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for phase, seconds in report.seconds.items():
        table.add_row(phase, f"{seconds:.2f} s", _detail(report, phase))
    console.print(table)
    sizes = report.sizes
    cache = f"{sizes['kv_bytes_per_token']:,} bytes a token"
    if sizes["kv_bytes_of_windows"]:
        cache += f" and {sizes['kv_bytes_of_windows'] / 1e6:.1f} MB a sequence"
    console.print(
        f"{report.package.name}: weights {sizes['weights'] / 1e6:.1f} MB, kernels {sizes['kernels'] / 1e6:.2f} MB,"
        f" KV cache {cache}, peak memory {report.peak_memory / 1e6:.0f} MB",
        soft_wrap=True,
    )
    peak, naive = (max(plan[which] for plan in report.memory.values()) for which in ("peak", "naive"))
    console.print(f"values of the largest step {peak / 1e6:.1f} MB, {naive / 1e6:.1f} MB if no two shared memory")
    if report.wheel:
        console.print(f"wheel: {report.wheel.name}", soft_wrap=True)


def _detail(report: CompileReport, phase: str) -> str:
    if phase == "kernels":
        return f"{len(report.kernel_seconds)} distinct"
    if phase == "passes":
        return f"{len(report.passes)} passes"
    if phase == "tuning":
        return "; ".join(_tuned(name, table) for name, table in report.tuning["architectures"].items())
    return ""


def _tuned(name: str, table: Mapping[str, Any]) -> str:
    """One architecture: how many of its products were measured, and for how many that changed the choice."""
    if table["device"] is None:
        return f"{name}: {table['note']}"
    products = table["products"]
    measured = [row for row in products if row["by"] == "measurement"]
    changed = sum(row["chosen"] != 0 for row in measured)
    return f"{name}: {len(measured)} of {len(products)} products measured, {changed} not as modelled"
