"""Golden tests: a text file holds a pipeline, its input and its expected output; `pytest --accept` rewrites the last.

    // any remark, kept as it is
    // RUN: fuse-norm,quantize{format=q4}
    <input text>
    // ---
    <expected text>

Several RUN lines are joined with commas. The runner is handed in, so this file knows nothing of the IR:

    @pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
    def test_golden(path: Path, accept: bool) -> None:
        check(path, run, accept=accept)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fixtures import REPOSITORY

RUN = "// RUN:"
SEPARATOR = "// ---"
Runner = Callable[[str, str], str]
"""(pipeline, input text) -> output text."""


@dataclass(frozen=True)
class Golden:
    """A golden file, taken apart. `header` and `input` are verbatim; `expected` ends with one newline, or is empty."""

    header: str
    pipeline: str
    input: str
    expected: str

    def __str__(self) -> str:
        return f"{self.header}{self.input}{SEPARATOR}\n{self.expected}"


def parse(text: str, name: str) -> Golden:
    """Take a golden file apart. Raises `ValueError`, naming the file, when it has no RUN line or no separator."""
    lines = text.splitlines(keepends=True)
    count = next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))
    if SEPARATOR in (line.rstrip() for line in lines[:count]):
        raise ValueError(f"{name}: there is no input between the header and {SEPARATOR!r}")
    runs = [line.removeprefix(RUN).strip() for line in lines[:count] if line.startswith(RUN)]
    if not runs or not all(runs):
        raise ValueError(f"{name}: expected a first line like '{RUN} fuse-norm'; found {lines[:1]}")
    places = [i for i, line in enumerate(lines) if line.rstrip() == SEPARATOR]
    if len(places) > 1:
        raise ValueError(
            f"{name}: expected one line {SEPARATOR!r} between input and expected text; found {len(places)}"
        )
    split = places[0] if places else len(lines)
    body = "".join(lines[count:split])
    return Golden(
        header="".join(lines[:count]),
        pipeline=",".join(runs),
        input=body if body.endswith("\n") else body + "\n",
        expected=tidy("".join(lines[split + 1 :])),
    )


def tidy(text: str) -> str:
    """The text without surrounding blank lines, ending with one newline; empty stays empty."""
    stripped = text.strip("\n")
    return f"{stripped}\n" if stripped else ""


def golden_files(folder: Path = REPOSITORY / "tests" / "golden") -> list[Path]:
    """The golden files of a folder, sorted by name."""
    return sorted(folder.glob("*.ir"))


def check(path: Path, run: Runner, *, accept: bool = False) -> None:
    """Run one golden file and compare; with `accept`, write what came out instead (only where it differs)."""
    text = path.read_text(encoding="utf-8")
    golden = parse(text, path.name)
    actual = tidy(run(golden.pipeline, golden.input))
    if accept:
        accepted = str(Golden(golden.header, golden.pipeline, golden.input, actual))
        if accepted != text:
            path.write_text(accepted, encoding="utf-8")
        return
    assert actual == golden.expected, f"{path.name}: the output changed; if that is meant, run pytest --accept"
