"""Whole models on a GPU: what `make test-gpu` adds to the kernels' tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.packages import open_package
from tests import tiny_models
from tests.e2e import gpu_packages
from tests.runtime.isolated import run_isolated

pytestmark = pytest.mark.gpu

ISOLATED = """
import importlib
model = importlib.import_module(os.environ["PACKAGE"]).load()
report = model.verify()
print(json.dumps({"ok": report.ok, "report": str(report), "seen": [x for x in seen if x != "load None"]}))
model.close()
"""

CHECKED = """
import importlib, sys
model = importlib.import_module(sys.argv[1]).load()
print([c.token_ids for c in model.generate([[1, 2, 3], [4], list(range(40))], max_new_tokens=4, ignore_eos=True)])
model.close()
"""

Package = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model("bf16")`, `model("f32")`: a Hugging Face folder."""
    root = gpu_packages.carried() or tmp_path_factory.mktemp("gpu")

    def get(dtype: str) -> Path:
        folder = root / "models" / dtype
        return folder if folder.exists() else gpu_packages.make_model(dtype, folder)

    return get


@pytest.fixture(scope="module")
def package(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Package:
    """`package(name)`: one of `gpu_packages.PACKAGES`, carried here or compiled."""
    root = gpu_packages.carried()
    made = tmp_path_factory.mktemp("packages")

    def get(name: str) -> Path:
        if root:
            return root / name
        from tests.backends.triton import on_gpu

        if not (made / name).exists():
            gpu_packages.make_package(name, model(gpu_packages.dtype_of(name)), made, on_gpu.variant().name)
        return made / name

    return get


@pytest.fixture
def opened(package: Package) -> Iterator[Callable[[str], Any]]:
    """`opened(name)`: the package's Model, closed after the test."""
    models: list[Any] = []

    def get(name: str) -> Any:
        models.append(open_package(package(name)).load(device="cuda:0"))
        return models[-1]

    yield get
    for loaded in models:
        loaded.close()


def test_a_model_in_f32_gives_the_tokens_of_the_cpu_backend(
    opened: Callable[[str], Any], model: Callable[[str], Path], tmp_path: Path
) -> None:
    root = gpu_packages.carried()
    if root:
        expected = json.loads((root / "tokens.json").read_text())
    else:
        pytest.importorskip("tvm", reason="the CPU backend's tokens were not carried here, and TVM is not installed")
        expected = gpu_packages.cpu_tokens(model("f32"), tmp_path / "cpu")
    assert gpu_packages.tokens(opened("f32")) == expected


def test_logits_are_those_of_transformers(opened: Callable[[str], Any], model: Callable[[str], Path]) -> None:
    loaded, judge = opened("bf16"), tiny_models.load(model("bf16"))
    ids = np.random.default_rng(0).integers(0, 1000, 50).tolist()
    expected = tiny_models.logits(judge, ids)
    largest = np.abs(expected).max()
    naive = np.abs(tiny_models.logits(judge.bfloat16(), ids) - expected).max() / largest
    assert np.abs(loaded.logits(ids) - expected).max() / largest <= 2 * naive
    completion = loaded.generate(ids, max_new_tokens=20, ignore_eos=True, profile=True)
    assert completion.token_ids == loaded.generate(ids, max_new_tokens=20, ignore_eos=True).token_ids
    assert completion.timings.profile


@pytest.mark.parametrize("name", gpu_packages.PACKAGES)
def test_packages_hold_their_checks_without_a_compiler(package: Package, name: str) -> None:
    place = package(name)
    found = run_isolated(ISOLATED, place.parent, PACKAGE=name, LD_LIBRARY_PATH=os.environ.get("LD_LIBRARY_PATH", ""))
    assert found["ok"], found["report"]
    assert {"load libcuda.so.1"} <= set(found["seen"]) <= {"load libcuda.so.1", "load launcher.so"}


@pytest.mark.parametrize("name", ["bf16", "q4_int8"])
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_no_access_goes_astray(package: Package, name: str, check: str) -> None:
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", check, "--error-exitcode", "9", sys.executable, "-c", CHECKED, name]
    done = subprocess.run(command, cwd=package(name).parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "SUMMARY: 0 " in done.stdout, done.stdout[-4000:]  # errors, or hazards
