"""The fake driver in place of libcuda.so.1, and packages for it, with and without a launcher.so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llmc.backends.triton.launcher import build_launcher
from llmc.runtime import cuda_api
from tests.runtime.cuda.fake import FakeCuda, build_fake_driver
from tests.runtime.cuda.packages import write_cuda_package


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    return FakeCuda(build_fake_driver(tmp_path_factory.mktemp("fake-cuda")))


@pytest.fixture
def cuda(fake_driver: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The fake driver, as what this process finds; afterwards nothing of it may be left in use."""
    monkeypatch.setattr(cuda_api, "LIBRARY", str(fake_driver.path))
    fake_driver.restart()
    yield fake_driver
    assert fake_driver.alive == (0, 0, 0, 0, 0)
    assert fake_driver.depth == 0


@pytest.fixture(scope="session")
def launcher_library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    library = build_launcher(tmp_path_factory.mktemp("launcher"))
    if library is None:
        pytest.skip("launcher.so is built by gcc")
    return library


@pytest.fixture(scope="session", params=["native", "ctypes"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, launcher_library: bytes) -> Path:
    """The package with a launcher.so, and without."""
    folder = tmp_path_factory.mktemp("packages") / "tiny_gpu_model"
    return write_cuda_package(folder, launcher_library if request.param == "native" else None)
