"""Every golden file: the text before a pipeline, and the text after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.passes.base import Pass
from llmc.passes.opt import optimize_text
from tests.golden import check, golden_files
from tests.golden import parse as parse_golden

FILES = golden_files()


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path: Path, accept: bool) -> None:
    check(path, lambda pipeline, text: optimize_text(text, pipeline)[0], accept=accept)


def test_every_pass_has_a_golden_file() -> None:
    run = {p for path in FILES for p in parse_golden(path.read_text(encoding="utf-8"), path.name).pipeline.split(",")}
    missing = {name for name in Pass.registry if not any(p.startswith(name) for p in run)}
    assert not missing
