"""Packages for AVX-512 BF16, whose activations are rounded to bf16: nearly the model that they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.backends.tvm.isa import ISAS
from llmc.checks import PAIR_STEP
from tests.backends.tvm.machine import runs_here
from tests.e2e.test_bit_equality import cut_logits, ragged_logits
from tests.fixtures import REPOSITORY, fixture_path

Load = Callable[..., Any]
PICOCODE = REPOSITORY / "examples" / "picocode"
TARGET = "cpu:avx512-bf16"

pytestmark = pytest.mark.skipif(
    not runs_here(ISAS["avx512-bf16"]), reason="needs AVX-512 BF16: this processor does not have it"
)


def recorded() -> Any:
    return json.loads((PICOCODE / "golden.json").read_text())


def tolerance(compiled: Callable[..., Path], **options: Any) -> float:
    return float(json.loads((compiled(PICOCODE, **options) / "checks.json").read_text())["tolerance"])


def test_perplexity_stays(load: Load) -> None:
    text = (fixture_path("models/picocode") / "val.txt").read_text()
    expected = recorded()["perplexity"]
    value = load(PICOCODE, target=TARGET).perplexity(text, context=expected["context"])
    assert value == pytest.approx(expected["value"], rel=5e-3), f"{value / expected['value'] - 1:+.2%}"


def test_checks_allow_for_the_rounding(load: Load, compiled: Callable[..., Path]) -> None:
    """With a cache of float32, whose own tolerance is far below it; what does not round keeps its own."""
    report = load(PICOCODE, target=TARGET, kv_quant="f32").verify()
    assert report.ok, str(report)
    assert report.tolerance == PAIR_STEP
    assert tolerance(compiled, kv_quant="f32") == 1e-4
    assert tolerance(compiled, target=TARGET, quant="q8") < PAIR_STEP


def test_logits_are_near_those_of_float32(load: Load) -> None:
    """Below the error of 25 products in a row, a quarter of what packages accept."""
    rounded, exact = (load(PICOCODE, target=target, kv_quant="f32") for target in (TARGET, "cpu"))
    for case in recorded()["cases"]:
        expected = exact.logits(case["greedy_ids"])
        error = np.abs(rounded.logits(case["greedy_ids"]) - expected).max() / np.abs(expected).max()
        assert 0 < error < 5 * 2.0**-9, case["prompt"]


def test_bits(load: Load) -> None:
    """The same whatever a sequence is batched with, however it is cut, with any number of threads."""
    one = load(PICOCODE, threads=1, target=TARGET)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 4096, n).tolist() for n in (29, 1, 17, 3)]
    expected = [one.logits(p) for p in prompts]
    for threads in (1, 2, 3):
        model = load(PICOCODE, threads=threads, target=TARGET)
        for prompt, want, ragged in zip(prompts, expected, ragged_logits(model, prompts), strict=True):
            assert np.array_equal(model.logits(prompt), want)
            assert np.array_equal(ragged, want)
            assert np.array_equal(cut_logits(model, prompt, [1] * len(prompt)), want)
