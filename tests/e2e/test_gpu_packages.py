"""What a GPU's machine is given beforehand; `test_gpu.py` is what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e import gpu_packages

pytest.importorskip("triton", reason="packages for GPUs are compiled by Triton")


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models, the packages, and the CPU backend's tokens for every prompt and kind of sampling."""
    monkeypatch.setattr(gpu_packages, "PACKAGES", ("q4_int8",))
    gpu_packages.main(tmp_path, "sm_80")
    manifest = json.loads((tmp_path / "q4_int8/manifest.json").read_text())
    assert [v["name"] for v in manifest["target"]["variants"]] == ["sm_80"]
    assert {p.name for p in (tmp_path / "models").iterdir()} == {"f32", "bf16"}
    tokens = json.loads((tmp_path / "tokens.json").read_text())
    expected = [gpu_packages.GREEDY, *gpu_packages.SAMPLED]
    assert [[len(ids) for ids in run] for run in tokens] == [[o["max_new_tokens"]] * 3 for o in expected]
    assert len({str(run) for run in tokens}) == len(tokens)
    monkeypatch.setenv("LLMC_TEST_PACKAGES", str(tmp_path))
    assert gpu_packages.carried() == tmp_path
