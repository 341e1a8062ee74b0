"""Packages of models whose attention reads a latent, against transformers' eager ones, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.test_bit_equality import ragged_logits
from tests.latent_models import CASES, SIZES, write_description
from tests.tiny_models import difference, logits, make_model, save, torch

TOLERANCE = 1e-4
LENGTHS = (23, 1, 9, 40)


def greedy(judge: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers generates without sampling."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    tokens: list[int] = judge.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
    return tokens


@pytest.mark.parametrize("case", ["two latents", "one latent, yarn", "complex rotation", "values wider than keys"])
def test_logits_and_tokens(case: str, tmp_path: Path, load: Callable[..., Any]) -> None:
    kind, changes = CASES[case]
    judge = make_model(kind, seed=1, **{**SIZES, **changes})
    model = load(save(judge, tmp_path / "model"), architecture=write_description(tmp_path))
    prompts = [np.random.default_rng(n).integers(0, 1021, n).tolist() for n in LENGTHS]
    expected = [logits(judge, p) for p in prompts]
    for prompt, want in zip(prompts, expected, strict=True):
        assert difference(model.logits(prompt), want) < TOLERANCE
    with model.sequence() as sequence:
        rows = np.stack([sequence.step(token).logits[0] for token in prompts[0]])
    assert difference(rows, expected[0]) < TOLERANCE
    for given, want in zip(ragged_logits(model, prompts[:3]), expected, strict=False):
        assert difference(given, want) < TOLERANCE
    with model.sequence() as sequence:
        step = sequence.prefill(prompts[2])
        tokens = []
        for _ in range(20):
            tokens.append(int(step.greedy[-1]))
            step = sequence.step(tokens[-1])
    assert tokens == greedy(judge, prompts[2], 20)


@pytest.mark.parametrize("kv_quant", ["f32", "int8"])
def test_a_token_takes_what_its_latent_does(kv_quant: str, tmp_path: Path, load: Callable[..., Any]) -> None:
    """In each of two layers a key of 19 + 6 elements and a value of 19, once for five heads."""
    judge = make_model("deepseek_v3", seed=1, **SIZES)
    model = load(save(judge, tmp_path / "model"), architecture=write_description(tmp_path), kv_quant=kv_quant)
    elements = 2 * (2 * 19 + 6)
    expected = {"f32": 4 * elements, "int8": elements + 2 * 2 * 4}[kv_quant]
    assert model.info["sizes"]["kv_bytes_per_token"] == expected
    prompt = np.random.default_rng(0).integers(0, 1021, 40).tolist()
    tolerance = {"f32": TOLERANCE, "int8": 4e-2}[kv_quant]
    assert difference(model.logits(prompt), logits(judge, prompt)) < tolerance
