"""launcher.so: the same bytes each time, needing nothing, and its layouts those that Python writes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from llmc.backends.triton.launcher import build_launcher
from llmc.runtime import cuda_launch


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launcher")
    data = build_launcher(folder)
    if data is None:
        pytest.skip("launcher.so is built by gcc")
    return folder / "launcher.so"


def test_builds_are_equal(library: Path, tmp_path: Path) -> None:
    assert build_launcher(tmp_path) == library.read_bytes()


def test_it_needs_no_library_and_no_version_of_one(library: Path) -> None:
    """So it loads with glibc 2.28 and older, and with others."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    done = subprocess.run(["readelf", "-dV", str(library)], capture_output=True, text=True, check=True)
    assert "NEEDED" not in done.stdout and "GLIBC" not in done.stdout
    assert "GNU_HASH" in done.stdout


def test_it_exports_three_functions(library: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    done = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in done.stdout.splitlines()]
    assert names == ["llmc_cuda_build", "llmc_cuda_replay", "llmc_cuda_run"]


def test_layouts_are_those_of_the_driver() -> None:
    """CUlaunchConfig and CUlaunchAttribute as cuda.h has them since 11.8, and the C file's Operation."""
    assert ctypes.sizeof(cuda_launch._Config) == 56 and cuda_launch._Config.stream.offset == 32
    assert ctypes.sizeof(cuda_launch._Attribute) == 72 and cuda_launch._Attribute.value.offset == 8
    assert ctypes.sizeof(cuda_launch._Operation) == 72 and cuda_launch._Operation.function.offset == 32


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build_launcher(tmp_path) is None
    monkeypatch.setenv("CC", "false")
    assert build_launcher(tmp_path) is None
