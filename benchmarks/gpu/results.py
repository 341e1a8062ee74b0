"""gpu.json: the machine, its ceilings, each row's result; written after every row, so that a run can go on later."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import Row

FILE = "gpu.json"


class Results:
    """The results in a folder. One process writes at a time; whoever opens it sees what was written before."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self.document: dict[str, Any] = {"machine": {}, "rows": {}}
        if self._path.exists():
            self.document = json.loads(self._path.read_text())

    @property
    def machine(self) -> dict[str, Any]:
        """The machine with its ceilings; empty before they were measured."""
        found: dict[str, Any] = self.document["machine"]
        return found

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """By row's name."""
        found: dict[str, dict[str, Any]] = self.document["rows"]
        return found

    def check_machine(self, gpu: str) -> None:
        """Raise `ValueError` where there are results of another GPU already."""
        before = self.machine.get("gpu", gpu)
        if before != gpu:
            raise ValueError(f"{self._path} has rows of {before}, and this is {gpu}: name another --out")

    def put_machine(self, machine: dict[str, Any]) -> None:
        """Note where rows are measured."""
        self.document["machine"] = machine
        self._write()

    def put(self, name: str, result: dict[str, Any]) -> None:
        """Note a row's result."""
        self.rows[name] = result
        self._write()

    def fail(self, row: Row, error: str) -> None:
        """Note that a row was tried and gave no result."""
        self.put(row.name, {"row": row.name, "kind": row.kind, "error": error})

    def missing(self, rows: Iterable[Row]) -> list[Row]:
        """Those without a result; one that failed is to be tried again."""
        return [row for row in rows if "error" in self.rows.get(row.name, {"error": ""})]

    def _write(self) -> None:
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps(self.document, indent=1) + "\n")
        aside.replace(self._path)
