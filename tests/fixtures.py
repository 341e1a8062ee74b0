"""Where the shared test inputs are: real models, configurations and tokenizers too large for the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def fixtures_root() -> Path:
    """The folder of shared inputs: `LLMC_FIXTURES`, else `../shared/fixtures` beside the repository."""
    given = os.environ.get("LLMC_FIXTURES")
    return Path(given) if given else REPOSITORY.parent / "shared" / "fixtures"


def fixture_path(name: str) -> Path:
    """One shared input, such as `models/picocode`; skips the test when the shared inputs are not on this machine.

    A name that is missing from inputs that *are* here is a mistake in the test: raises `FileNotFoundError`.
    """
    root = fixtures_root()
    if not root.is_dir():
        pytest.skip(f"the shared test inputs are not at {root} (set LLMC_FIXTURES to the folder that holds them)")
    path = root / name
    if not path.exists():
        raise FileNotFoundError(f"{root} has no {name!r}; it holds {sorted(p.name for p in root.iterdir())}")
    return path
