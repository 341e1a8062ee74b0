"""What every test shares: `--accept`, hypothesis profiles, the rule for GPU tests, and packages compiled once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports triton, which reads it then; compiles happen in processes that do not have it.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

from llmc.driver import compile_model
from llmc.ir.errors import LlmcError
from llmc.options import CompileOptions
from llmc.packages import open_package

Compile = Callable[..., Path]

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests recorded is part of what a run says."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties if isinstance(report, pytest.TestReport) else ():
            terminalreporter.write_line(f"{name}: {value}")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """`compiled(model, **options)`: the package's folder; the same model and options are compiled once."""
    shared = tmp_path_factory.getbasetemp().parent if os.environ.get("PYTEST_XDIST_WORKER") else None
    root = (shared or tmp_path_factory.getbasetemp()) / "packages"

    def make(model: Path, **options: Any) -> Path:
        described = json.dumps({"model": str(model), **{k: str(v) for k, v in options.items()}}, sort_keys=True)
        output = root / f"p{hashlib.sha256(described.encode()).hexdigest()[:12]}"
        if not output.exists():
            try:
                compile_model(model, output, CompileOptions(**options))
            except LlmcError as error:  # another worker was first
                if not (output / "manifest.json").exists():
                    raise AssertionError(str(error)) from error
        return output

    return make


@pytest.fixture(scope="session")
def load(compiled: Compile) -> Callable[..., Any]:
    """`load(model, threads=…, **options)`: the compiled package's Model."""
    loaded: dict[str, Any] = {}

    def get(model: Path, threads: int | None = None, **options: Any) -> Any:
        folder = compiled(model, **options)
        key = f"{folder}:{threads}"
        if key not in loaded:
            loaded[key] = open_package(folder).load(threads=threads)
        return loaded[key]

    return get
