"""Every system that is compared lives in a process of its own, and is asked over its standard input and output.

One line of JSON each way. A request is `{"command": "decode", "depth": 512, "steps": 64, "sequences": 1}`, the answer
`{"result": ...}` or `{"error": "..."}`. Processes stay alive between requests, so systems can be measured in turns, and
nobody pays for loading. This module needs the standard library alone: it runs in the peers' interpreter too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = ("load", "facts", "prefill", "decode", "probe")


class WorkerError(Exception):
    """A worker could not do what it was asked; the message is its own."""


class System(Protocol):
    """What a worker serves. Loading, filling contexts and warming up happen outside the seconds that are answered."""

    def load(self, path: str, threads: int, longest: int) -> None:
        """Load a model from a file or folder, for contexts of up to `longest` tokens."""

    def facts(self) -> dict[str, Any]:
        """What was loaded: `versions`, `settings`, `weights_bytes`, `lm_head`, `kv_cache`; and, where it is known,
        `step_bytes`: what a decode step reads and writes, fixed, for each token, and for each token of context."""

    def prefill(self, tokens: int) -> float:
        """Seconds to read `tokens` tokens into an empty context and to have the last one's logits."""

    def decode(self, depth: int, steps: int, sequences: int) -> float:
        """Seconds for `steps` greedy steps of `sequences` sequences that hold `depth` tokens each before the first."""


def serve(system: System) -> None:
    """Answer requests until the input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(system, line)) + "\n")
        answers.flush()
    answers.close()
    # Some runtimes abort when their threads are torn down; all has been answered by then.
    os._exit(0)


def answer(system: System, line: str) -> dict[str, Any]:
    """What to answer to one line."""
    try:
        request = json.loads(line)
        command = request.pop("command")
        if command not in COMMANDS or not hasattr(system, command):
            return {"error": f"{command!r} is not what this worker can do"}
        return {"result": getattr(system, command)(**request)}
    except Exception as error:  # noqa: BLE001 - one system's failure must not end the comparison of the others
        return {"error": f"{type(error).__name__}: {error}"}


class Worker:
    """The parent's end of a process that runs a module with `serve` in it.

    `module` runs by `python -m` in the repository; what it prints goes to the file `log`. A context manager.
    """

    def __init__(self, name: str, python: str, module: str, log: Path, environment: Mapping[str, str] = {}) -> None:
        self.name = name
        self.log = log
        self._log_file = log.open("wb")
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            env={**os.environ, **environment},
            text=True,
            encoding="utf-8",
        )

    def ask(self, command: str, **arguments: Any) -> Any:
        """The result of one request. Raises `WorkerError` for an error or a dead process."""
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None and sink is not None
        try:
            sink.write(json.dumps({"command": command, **arguments}) + "\n")
            sink.flush()
            line = source.readline()
        except OSError as error:
            raise WorkerError(f"{self.name}: {error}; see {self.log}") from error
        if not line:
            raise WorkerError(f"{self.name} ended with status {self._process.wait()}; see {self.log}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}: {reply['error']}; see {self.log}")
        return reply["result"]

    def cpu_seconds(self) -> float:
        """Processor time of all its threads that are alive, from the scheduler: nanoseconds, not ticks."""
        total = 0
        for task in Path(f"/proc/{self._process.pid}/task").iterdir():
            try:
                total += int((task / "schedstat").read_text().split()[0])
            except OSError:  # a thread that ended meanwhile
                continue
        return total / 1e9

    def settle(self, limit: float = 2.0) -> bool:
        """Wait until its threads sleep: some thread pools spin for a while after their work. False: they still spin."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            before = self.cpu_seconds()
            time.sleep(0.01)
            if self.cpu_seconds() - before < 0.0005:
                return True
        return False

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(5)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log_file.close()
