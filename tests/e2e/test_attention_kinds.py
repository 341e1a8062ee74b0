"""Tiny models with windows, caps, slopes and norms of heads, as packages: transformers' logits, and always the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.architectures.families import FAMILIES
from tests.e2e.test_bit_equality import cut_logits, ragged_logits
from tests.tiny_models import difference, logits, make_model, save

TOLERANCE = 1e-4
LENGTHS = (23, 1, 9, 31)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "bloom", "olmo2", "qwen3"])
def test_logits(family: str, tmp_path: Path, load: Callable[..., Any]) -> None:
    """A prompt whole, cut into chunks, token by token, and in a ragged batch."""
    case = FAMILIES[family]
    judge = make_model(case.model_type, seed=1, **case.config)
    model = load(save(judge, tmp_path / "model"), threads=2)
    prompts = [np.random.default_rng(n).integers(0, 503, n).tolist() for n in LENGTHS]
    for prompt, ragged in zip(prompts, ragged_logits(model, prompts), strict=True):
        n = len(prompt)
        found = model.logits(prompt)
        assert difference(found, logits(judge, prompt)) < TOLERANCE
        assert np.array_equal(ragged, found)
        assert np.array_equal(cut_logits(model, prompt, [1] * n), found)
        assert np.array_equal(cut_logits(model, prompt, [n // 2, n - n // 2] if n > 1 else [1]), found)
