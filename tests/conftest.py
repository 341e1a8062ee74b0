"""What every test shares: the `--accept` option, hypothesis profiles, and the rule for GPU tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("llmc", deadline=None, print_blob=True)
settings.register_profile("llmc-ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("llmc-ci" if os.environ.get("CI") else "llmc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="rewrite the expected part of golden files; review the diff")


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten."""
    return bool(request.config.getoption("--accept"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: this machine has none"))
