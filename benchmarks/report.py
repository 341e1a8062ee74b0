"""What a comparison prints: who ran with what, and one line for each measure and system."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_console = Console(highlight=False, soft_wrap=True)
if not _console.is_terminal:
    _console.width = 120
MUCH = 0.05
"""Cores in use by others from which on a line is marked."""


def say(text: str) -> None:
    """Progress and reasons, to the terminal."""
    _console.print(text, markup=False)


def print_facts(document: dict[str, Any]) -> None:
    """The machine, then each system's bits, types, settings and versions."""
    machine = document["machine"]
    say(f"\n{document['date']}  {document['command']}")
    say(
        f"{machine['processor']}, {machine['cores']} cores, {document['threads']} threads: {' '.join(machine['flags'])}"
    )
    say(f"{document['shape']}, {document['parameters']:,} parameters, random weights")
    for name, facts in document["systems"].items():
        say(
            f"{name}: {facts['bits_per_weight']:.2f} bits a weight, lm_head {facts['lm_head']}, "
            f"KV cache {facts['kv_cache']}"
        )
        for kind in ("settings", "versions"):
            say(f"  {kind}: " + "; ".join(f"{key} {value}" for key, value in facts[kind].items()))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Medians; ratios are ours over theirs, from pairs of one round, with quartiles."""
    table = Table(box=None, pad_edge=False)
    for name in ("measure", "system"):
        table.add_column(name)
    for name in (
        "tokens/s",
        "llmc faster by",
        "quartiles",
        "GB/s",
        "of read",
        "plain read",
        "others' cores",
    ):
        table.add_column(name, justify="right")
    before = None
    for row in rows:
        ratio, busy = row["ratio"], row["foreign"] + row["idle"]
        table.add_row(
            row["measure"] if row["measure"] != before else "",
            row["system"],
            f"{row['tokens_per_second']:,.1f}",
            f"{ratio['median']:.2f} ×" if ratio else "",
            f"{ratio['low']:.2f} – {ratio['high']:.2f}" if ratio else "",
            f"{row['bandwidth'] / 1e9:.1f}" if "bandwidth" in row else "",
            f"{row['share']:.0%}" if "share" in row else "",
            f"{row['probe'] / 1e9:.1f}",
            f"{busy:.2f}{' !' if busy > MUCH else ''}",
        )
        before = row["measure"]
    _console.print(table)
    if any(row["foreign"] + row["idle"] > MUCH for row in rows):
        say("! other work kept the machine busy during these runs: do not quote them")
