"""Whole models on a GPU: what `make test-gpu` adds to the kernels' tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc.driver import compile_model
from llmc.options import CompileOptions
from llmc.packages import open_package
from tests import tiny_models

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 1000}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_models.make_model("llama", **SIZES, num_key_value_heads=2)
    return tiny_models.save(made.bfloat16(), tmp_path_factory.mktemp("model") / "model")


def package(model: Path, output: Path, **options: str) -> Path:
    from tests.backends.triton import on_gpu

    compile_model(model, output, CompileOptions(target=f"cuda:{on_gpu.variant().name}", **options))  # type: ignore[arg-type]
    return output


def test_logits_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    loaded = open_package(package(model, tmp_path / "p")).load(device="cuda:0")
    judge = tiny_models.load(model)
    ids = np.random.default_rng(0).integers(0, 1000, 50).tolist()
    expected = tiny_models.logits(judge, ids)
    largest = np.abs(expected).max()
    naive = np.abs(tiny_models.logits(judge.bfloat16(), ids) - expected).max() / largest
    assert np.abs(loaded.logits(ids) - expected).max() / largest <= 2 * naive
    completion = loaded.generate(ids, max_new_tokens=20, ignore_eos=True, profile=True)
    assert completion.token_ids == loaded.generate(ids, max_new_tokens=20, ignore_eos=True).token_ids
    assert completion.timings.profile
    loaded.close()


@pytest.mark.parametrize(
    ("quant", "kv_quant"), [("none", "fp8"), ("q4", "int8"), ("q8", "none"), ("q4g128", "fp8"), ("fp8", "none")]
)
def test_packages_hold_their_checks(model: Path, tmp_path: Path, quant: str, kv_quant: str) -> None:
    loaded = open_package(package(model, tmp_path / "p", quant=quant, kv_quant=kv_quant)).load()
    report = loaded.verify()
    assert report.ok, str(report)
    loaded.close()


def test_no_access_goes_astray(model: Path, tmp_path: Path) -> None:
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    output = package(model, tmp_path / "checked")
    code = (
        "import checked; m = checked.load(); print(m.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True).token_ids)"
    )
    command = [tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=output.parent, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
