"""The parent: it starts workers, ends one whose row takes too long, notes the failure, and goes on with the rest."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from benchmarks.gpu.results import Results
from benchmarks.gpu.rows import Row

GRACE = 30.0
"""Seconds for a worker to start, and to end."""


def supervise(
    rows: Sequence[Row],
    out: Path,
    deadline: float,
    command: Callable[[Sequence[Row]], list[str]],
    say: Callable[[str], None],
) -> None:
    """Measure the rows that have no result yet, until `deadline` (by `time.monotonic`).

    `command` gives a worker's command line for some rows. A row that failed in this run is not tried again in it.
    """
    left = Results(out).missing(rows)
    say(f"{len(rows) - len(left)} of {len(rows)} rows are there already")
    while left and time.monotonic() < deadline:
        begun, status = _watch(left, out, command(left), deadline, say)
        left = [row for row in left if row.name not in begun]
        if status == 0 or not begun:  # it has seen all rows, or another would fare no better
            break
    if left:
        say(f"{len(left)} rows were not begun; the same command goes on with them")


def _watch(
    rows: Sequence[Row], out: Path, command: list[str], deadline: float, say: Callable[[str], None]
) -> tuple[set[str], int]:
    """Run one worker to its end; gives the names of the rows that it began, and its status."""
    names = {row.name: row for row in rows}
    begun: set[str] = set()
    current, limit, why = "", time.monotonic() + GRACE, "did not start"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        for message in _messages(worker.stdout, lambda: limit):
            if message is None:
                worker.kill()
                why = "was stopped: it took too long"
                break
            current, limit = _note(message, current, begun, say)
            limit = min(limit, deadline + GRACE)
        status = worker.wait()
        why = f"ended with status {status}" if why == "did not start" else why
    if current in names:
        Results(out).fail(names[current], f"the worker {why} at this row")
        say(f"{current}: the worker {why}")
    elif not begun and status:
        say(f"the worker {why}")
    return begun, status


def _note(
    message: dict[str, object], current: str, begun: set[str], say: Callable[[str], None]
) -> tuple[str, float]:
    """What a message means: the row that the worker is at now, and until when it may be silent."""
    now = time.monotonic()
    if "row" in message:
        name, budget = message["row"], message["budget"]
        assert isinstance(name, str) and isinstance(budget, float | int)
        if name:
            begun.add(name)
        return name, now + budget
    if "done" in message:
        say(f"{message['done'] or 'ceilings'}: {message['result']}")
        return "", now + GRACE
    say(f"{message['skipped']}: not begun, {message['left']:.0f} s are left")
    return current, now + GRACE


def _messages(stream: IO[str], limit: Callable[[], float]) -> Iterator[dict[str, object] | None]:
    """A worker's messages; None when it was silent for longer than it may be. What is no JSON is none of them."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for text in stream:
            lines.put(text)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            text = lines.get(timeout=max(0.01, limit() - time.monotonic()))
        except queue.Empty:
            yield None
            return
        if not text:
            return
        if text.startswith("{"):
            yield json.loads(text)
