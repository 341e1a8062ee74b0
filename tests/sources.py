"""The repository's own files, for the tests that look after the house."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.fixtures import REPOSITORY

LINKED = ("ir", "passes", "backends", "templates")
"""Top-level folders whose import name is `llmc.<folder>`, through a tracked link."""


def repository_files() -> list[str]:
    """What is tracked or about to be: paths relative to the repository, links as links, sorted."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    return sorted(name for name in set(listed) if name and (REPOSITORY / name).exists())


def import_path(name: str) -> str | None:
    """Where a repository file lies as seen from imports (`ir/op.py` -> `llmc/ir/op.py`), or None outside llmc."""
    first = Path(name).parts[0]
    if first == "llmc":
        return name
    return f"llmc/{name}" if first in LINKED else None
