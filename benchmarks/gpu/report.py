"""What was measured, as a Markdown table, a JSON document with its date and GPU, and a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Results
from benchmarks.gpu.rows import all_rows
from benchmarks.gpu.svg import Bar, Bars, bar_chart

HEAD = (
    "| row | ms a step | quartiles | tokens/s | GB | bound, ms | of the bound | kernels | GPU memory, GB | peer, ms"
    " | ours faster by |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
MARK = "†"
PREFILL_MARK = "‡"


def write_report(out: Path, results: Path | None, say: Callable[[str], None]) -> None:
    """Print the report; write report.md and shares.svg into `out`, and DATE-GPU.json and .svg into `results`.

    Raises `ValueError` where nothing was measured.
    """
    document = Results(out).document
    if not document["machine"]:
        raise ValueError(f"{out} has no results: run 'python -m benchmarks.gpu run FOLDER --out {out}' first")
    text, picture = markdown(document), chart(document)
    (out / "report.md").write_text(text)
    (out / "shares.svg").write_text(picture)
    say(text)
    if results is not None:
        results.mkdir(parents=True, exist_ok=True)
        stem = file_stem(document)
        (results / f"{stem}.json").write_text(json.dumps({"date": date_of(document), **document}, indent=1) + "\n")
        (results / f"{stem}.svg").write_text(picture)
        say(f"written: {results / stem}.json and .svg")


def markdown(document: Mapping[str, Any]) -> str:
    """The machine, the steps, the first tokens, and what failed."""
    rows = list(in_order(document["rows"]))
    steps = [row for row in rows if "milliseconds" in row]
    parts = [_machine(document)]
    if steps:
        parts.append("\n".join([HEAD, *map(_step, steps)]))
        parts += _footnotes(steps)
    first = [row for row in rows if "first_token" in row]
    if first:
        parts.append("\n".join([*_FIRST_HEAD, *(line for row in first for line in _first(row))]))
    failed = [f"- {row['row']}: {row['error']}" for row in rows if "error" in row]
    if failed:
        parts.append("\n".join(["Failed:", "", *failed]))
    return "\n\n".join(parts) + "\n"


def chart(document: Mapping[str, Any]) -> str:
    """Shares of the bound. A row with a peer takes the place of the same row without."""
    rows = {row["row"]: row for row in in_order(document["rows"]) if "milliseconds" in row}
    beside = {name.partition("-vs-")[0] for name in rows if "-vs-compile" in name}
    bars = []
    for name, row in rows.items():
        if name in beside:
            continue
        peer = row.get("peer")
        theirs = Bar(peer["share"], f"{peer['milliseconds']['median']:.2f} ms ({peer['name']})") if peer else None
        note = f"{row['milliseconds']['median']:.2f} ms"
        bars.append(Bars(name.partition("-vs-")[0], Bar(row["share"], note), theirs))
    m = document["machine"]
    subtitle = (
        f"{m['gpu']}, {date_of(document)}: {m['copy_bandwidth'] / 1e12:.2f} TB/s copied,"
        f" {m['matrix_rate'] / 1e12:.0f} TFLOP/s in bf16"
    )
    return bar_chart("Share of the measured bound", subtitle, bars, "llmc", "peer")


def in_order(rows: Mapping[str, dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Results in the order of `rows.all_rows`; those of rows that are no more come last."""
    known = [row.name for row in all_rows()]
    return [rows[name] for name in sorted(rows, key=lambda n: known.index(n) if n in known else len(known))]


def date_of(document: Mapping[str, Any]) -> str:
    """The day of the first row; of the ceilings where there is none."""
    days = [row["at"][:10] for row in document["rows"].values() if "at" in row]
    return str(min(days, default=document["machine"].get("at", "no date")[:10]))


def file_stem(document: Mapping[str, Any]) -> str:
    """Such as 2026-11-25-nvidia-h200."""
    return f"{date_of(document)}-{re.sub(r'[^a-z0-9]+', '-', document['machine']['gpu'].lower()).strip('-')}"


def _machine(document: Mapping[str, Any]) -> str:
    m = document["machine"]
    smi, versions = m.get("nvidia_smi", {}), m.get("versions", {})
    clocks = f"SM {smi['clocks.sm']} of {smi['clocks.max.sm']}" if "clocks.sm" in smi else "clocks unknown"
    return (
        f"{date_of(document)}, {m['gpu']}, driver {smi.get('driver_version', 'unknown')}, {clocks} at first; "
        + ", ".join(f"{name} {value}" for name, value in versions.items())
        + f".\nMeasured first: a copy on the device {m['copy_bandwidth'] / 1e12:.2f} TB/s (read and written), "
        f"a plain read {m['read_bandwidth'] / 1e12:.2f} TB/s, bf16 products {m['matrix_rate'] / 1e12:.0f} TFLOP/s."
    )


def _step(row: Mapping[str, Any]) -> str:
    step, peer = row["milliseconds"], row.get("peer")
    name = (
        f"{row['row']}{' ' + MARK if row['fits_cache'] else ''}{' ' + PREFILL_MARK if row['kind'] == 'prefill' else ''}"
    )
    theirs = f"{peer['milliseconds']['median']:.3f} ({peer['name']}, {peer['share']:.0%})" if peer else ""
    faster = (
        f"{peer['ratio']['median']:.2f} × ({peer['ratio']['low']:.2f} – {peer['ratio']['high']:.2f})" if peer else ""
    )
    return (
        f"| {name} | {step['median']:.3f} | {step['low']:.3f} – {step['high']:.3f} | {row['tokens_per_second']:,.0f}"
        f" | {row['bytes'] / 1e9:.2f} | {row['bound_milliseconds']:.3f} | {row['share']:.0%} | {row['kernels']}"
        f" | {row['memory_planned'] / 1e9:.1f} | {theirs} | {faster} |"
    )


def _footnotes(steps: list[dict[str, Any]]) -> list[str]:
    notes = []
    if any(row["fits_cache"] for row in steps):
        notes.append(f"{MARK} A step's bytes fit into the L2 cache: the share says nothing about memory.")
    if any(row["kind"] == "prefill" for row in steps):
        shares = ", ".join(f"{r['row']} {r['matrix_share']:.0%}" for r in steps if r["kind"] == "prefill")
        notes.append(f"{PREFILL_MARK} Bound by arithmetic; of the measured rate of bf16 products: {shares}.")
    return notes


_FIRST_HEAD = (
    "| first token of a new process | weights, GB | file | total, s | process | import | load | prefill | read, s |",
    "|---|---|---|---|---|---|---|---|---|",
)


def _first(row: Mapping[str, Any]) -> Iterable[str]:
    found = row["first_token"]
    for name, words in (("cached", "in the system's cache"), ("dropped", "dropped from it")):
        t = found[name]
        yield (
            f"| {row['row']} | {found['weights_bytes'] / 1e9:.2f} | {words} | {t['total']:.2f} | {t['process']:.2f}"
            f" | {t['import']:.2f} | {t['load']:.2f} | {t['prefill']:.2f} | {t['read_weights']:.2f} |"
        )
