"""Every family's package for this CPU against transformers' eager model: logits in float32, and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.architectures.families import FAMILIES
from tests.e2e.test_bit_equality import ragged_logits
from tests.tiny_models import difference, logits, make_model, save

TOLERANCE = 1e-4
LENGTHS = (23, 1, 9, 40)
"""Of prompts: windows are shorter, and a step has at most 16 tokens of one."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_package(family: str, tmp_path: Path, load: Callable[..., Any]) -> None:
    """Prefill, token by token across a window's edge, a ragged batch; then greedy tokens."""
    case = FAMILIES[family]
    judge = make_model(case.model_type, seed=1, **case.config)
    model = load(save(judge, tmp_path / "model"), max_sequence_length=case.longest)
    prompts = [np.random.default_rng(n).integers(0, 503, n).tolist() for n in LENGTHS if n >= case.shortest]
    expected = [logits(judge, p) for p in prompts]
    for prompt, want in zip(prompts, expected, strict=True):
        assert difference(model.logits(prompt), want) < TOLERANCE
    with model.sequence() as sequence:
        rows = np.stack([sequence.step(token).logits[0] for token in prompts[0]])
    assert difference(rows, expected[0]) < TOLERANCE
    short = [p for p in prompts if len(p) < 30]  # a step gives so many rows at most
    for given, want in zip(ragged_logits(model, short), expected, strict=False):
        assert difference(given, want) < TOLERANCE
    completions = model.generate(prompts[:2], max_new_tokens=12, ignore_eos=True)
    for completion in completions:
        whole = completion.prompt_token_ids + completion.token_ids
        ahead = logits(judge, whole)[len(completion.prompt_token_ids) - 1 : -1]
        assert completion.token_ids == ahead.argmax(-1).tolist()
