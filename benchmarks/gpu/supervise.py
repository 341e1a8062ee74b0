"""The parent: it starts workers, ends one whose row takes too long, notes the failure, and goes on with the rest."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.results import Results
from benchmarks.gpu.rows import Row

START, GRACE = 60.0, 5.0
"""Seconds for a worker to start in; and beyond a row's budget, which it keeps itself where it can."""


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
    watched = _Watched(deadline, say)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        late = False
        for message in _messages(worker.stdout, watched):
            late = message is None
            if message is None:
                worker.kill()
                break
            watched.note(message)
        status = worker.wait()
    why = "was stopped, as it took too long" if late else f"ended with status {status}"
    if watched.current in names:
        Results(out).fail(names[watched.current], f"the worker {why}")
        say(f"{watched.current}: the worker {why}")
    elif late or (status and not watched.begun):
        say(f"the worker {why}")
    return watched.begun, status


class _Watched:
    """Where a worker is: `current` row, `begun` rows, and the time by which it must say more."""

    def __init__(self, deadline: float, say: Callable[[str], None]) -> None:
        self.current, self.begun = "", set[str]()
        self.limit = time.monotonic() + START
        self._deadline, self._say = deadline, say

    def note(self, message: dict[str, Any]) -> None:
        """Take a message; see `worker.work`."""
        allowed = GRACE
        if "row" in message:
            self.current, allowed = message["row"], message["budget"] + GRACE
            self.begun |= {self.current} - {""}
        elif "done" in message:
            self.current = ""
            self._say(f"{message['done'] or 'ceilings'}: {message['result']}")
        else:
            self._say(f"{message['skipped']}: not begun, {message['left']:.0f} s are left")
        self.limit = min(time.monotonic() + allowed, self._deadline + GRACE)


def _messages(stream: IO[str], watched: _Watched) -> Iterator[dict[str, Any] | None]:
    """A worker's messages; None when it was silent for longer than it may be. What is no JSON is none of them."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for text in stream:
            lines.put(text)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            text = lines.get(timeout=max(0.01, watched.limit - time.monotonic()))
        except queue.Empty:
            yield None
            return
        if not text:
            return
        if text.startswith("{"):
            yield json.loads(text)
