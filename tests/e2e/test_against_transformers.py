"""Tiny random models of odd sizes: a package's logits against transformers' eager ones, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.architectures.test_against_transformers import CASES
from tests.e2e.test_bit_equality import ragged_logits
from tests.tiny_models import difference, logits, make_model, save, stepwise_logits

TOLERANCE = 1e-4
LENGTHS = (23, 1, 9, 40)


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path, load: Callable[..., Any]) -> None:
    """Prefill, token by token, and a ragged batch, through the entry points that `generate` uses."""
    kind, changes = CASES[case]
    judge = make_model(kind, seed=1, **changes)
    model = load(save(judge, tmp_path / "model"))
    prompts = [np.random.default_rng(n).integers(0, 1021, n).tolist() for n in LENGTHS]
    expected = [logits(judge, p) for p in prompts]
    for prompt, want in zip(prompts, expected, strict=True):
        assert difference(model.logits(prompt), want) < TOLERANCE
    with model.sequence() as sequence:
        rows = np.stack([sequence.step(token).logits[0] for token in prompts[0]])
    assert difference(rows, stepwise_logits(judge, prompts[0])) < TOLERANCE
    for given, want in zip(ragged_logits(model, prompts[:3]), expected, strict=False):
        assert difference(given, want) < TOLERANCE
