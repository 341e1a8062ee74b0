"""Quantized packages: the model that their codes stand for, nearly the model that they were made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.quantized_llama import QuantizedLlama
from tests.e2e.test_bit_equality import cut_logits, ragged_logits
from tests.fixtures import REPOSITORY, fixture_path
from tests.tolerance import assert_as_good_as

Load = Callable[..., Any]
PICOCODE = REPOSITORY / "examples" / "picocode"


def recorded(folder: Path) -> Any:
    return json.loads((folder / "golden.json").read_text())


@pytest.mark.parametrize("format", ["q4", "q8"])
def test_logits_are_those_of_the_dequantized_model(format: str, load: Load) -> None:
    """With the same quantization of activations, in float64; judged by the same in float32."""
    model = load(PICOCODE, quant=format, kv_quant="f32")
    exact, plain = (QuantizedLlama(PICOCODE, format, dtype) for dtype in (np.float64, np.float32))
    prompts = [case["prompt_ids"] for case in recorded(PICOCODE)["cases"]]
    given, naive, truth = (
        np.concatenate([logits(p) for p in prompts]) for logits in (model.logits, plain.logits, exact.logits)
    )
    assert_as_good_as(given, naive, truth, f"logits of {format}")


@pytest.mark.parametrize(("format", "largest"), [("q8", 0.002), ("q4", 0.025)])
def test_perplexity_stays(format: str, largest: float, load: Load) -> None:
    """Everything in the format, the lm_head too; against the recorded perplexity of float32."""
    text = (fixture_path("models/picocode") / "val.txt").read_text()
    expected = recorded(PICOCODE)["perplexity"]
    model = load(PICOCODE, quant=format)
    assert model.info["quantization"]["lm_head"] == model.info["quantization"]["weights"] == format
    value = model.perplexity(text, context=expected["context"])
    assert value <= expected["value"] * (1 + largest), f"{value / expected['value'] - 1:+.2%}"


@pytest.mark.parametrize(("name", "least"), [("picocode", 8), ("stories260K", 7)])
def test_greedy_tokens_of_q8(name: str, least: int, load: Load) -> None:
    """32 tokens of each of 10 prompts: as many prompts as with plain 8-bit rounding give the tokens of float32.

    At some places two tokens are nearly equal in float32, and which one wins depends on the last bit of an activation
    before it is rounded: so one instruction set is chosen, whose bits are the same on every machine.
    """
    folder = PICOCODE if name == "picocode" else fixture_path(f"models/{name}")
    model = load(folder if name == "picocode" else folder / "hf", quant="q8", target="cpu:x86-64-v3")
    cases = recorded(folder)["cases"][:10]
    completions = model.generate([case["prompt_ids"] for case in cases], max_new_tokens=32)
    agree = [
        completion.token_ids == case["greedy_ids"][len(case["prompt_ids"]) :][:32]
        for case, completion in zip(cases, completions, strict=True)
    ]
    assert len(cases) == 10 and sum(agree) >= least, agree


@pytest.mark.parametrize("format", ["q4", "q8"])
def test_bits(format: str, load: Load) -> None:
    """The same whatever a sequence is batched with, however it is cut, with any number of threads."""
    one = load(PICOCODE, threads=1, quant=format)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 4096, n).tolist() for n in (29, 1, 17, 3)]
    expected = [one.logits(p) for p in prompts]
    for threads in (1, 2, 3):
        model = load(PICOCODE, threads=threads, quant=format)
        for prompt, want, ragged in zip(prompts, expected, ragged_logits(model, prompts), strict=True):
            n = len(prompt)
            assert np.array_equal(model.logits(prompt), want)
            assert np.array_equal(ragged, want)
            assert np.array_equal(cut_logits(model, prompt, [1] * n), want)


@pytest.mark.parametrize("format", ["q4", "q8"])
def test_other_architectures(format: str, load: Load) -> None:
    """Biases, an untied head, widths that are no multiple of 32: their stored checks hold."""
    for name in ("gpt-nano-sort", "stories260K"):
        report = load(fixture_path(f"models/{name}") / "hf", quant=format).verify()
        assert report.ok, str(report)


def test_a_layer_of_a_decode_step_has_five_barriers(compiled: Callable[..., Path]) -> None:
    """After queries, keys and values; attention; its output; gate and up; down. Norms, rotations, the quantization of
    activations, residual additions and the largest logit are inside these or repeated by every task."""
    plan = json.loads((compiled(PICOCODE, quant="q4") / "plan.json").read_text())
    decode = plan["entries"]["decode"]["launches"]
    kinds = [plan["kernels"][launch["kernel"]].rpartition("_")[0] for launch in decode if not launch["each"]]
    layer = ["quantized_linear", "split_attention", "quantized_linear", "quantized_gated_linear", "quantized_linear"]
    assert kinds == [*layer * 6, "quantized_linear", "best_of_panels"]
    repeated = {plan["kernels"][launch["kernel"]].rpartition("_")[0] for launch in decode if launch["each"]}
    assert repeated == {
        "quantized_embedding",
        "rotary_table",
        "rms_norm",
        "combine_splits",
        "quantize_tiles",
        "gather_rows",
    }
