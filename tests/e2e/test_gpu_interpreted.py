"""Whole models through the plan that a GPU runs, kernel by kernel in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmc.packages import open_package
from tests import tiny_models
from tests.backends.triton.interpreted_package import compile_interpreted, load_interpreted
from tests.conftest import Compile

PROMPTS = ([5, 700, 33, 1, 8, 99], [42, 7], [1000])


def test_a_model_in_f32_gives_the_tokens_of_the_cpu_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Compile
) -> None:
    source = tiny_models.save(tiny_models.make_model("llama", num_key_value_heads=1), tmp_path / "model")
    sources = compile_interpreted(monkeypatch, source, tmp_path / "package")
    model, device = load_interpreted(tmp_path / "package", sources)
    cpu = open_package(compiled(source, target="cpu:x86-64-v3", limits=None)).load(threads=1)
    expected = cpu.generate([list(p) for p in PROMPTS], max_new_tokens=6, ignore_eos=True)
    given = model.generate([list(p) for p in PROMPTS], max_new_tokens=6, ignore_eos=True)
    assert [c.token_ids for c in given] == [c.token_ids for c in expected]
    assert device.replays == 6
    logits, wanted = model.logits(PROMPTS[0]), cpu.logits(list(PROMPTS[0]))
    assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max()
