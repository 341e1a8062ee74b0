"""Packages whose layers have windows: kernels, blocks and tables of each group, against transformers and float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.ir.errors import LlmcError
from llmc.options import Limits
from llmc.report.verification import verify_package
from llmc.runtime.kv_cache import blocks_of_window
from llmc.step_ledger import step_ledger
from tests.tiny_models import logits, make_model, save

WINDOW, STEP = 24, 32
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": SHAPE,
    "gemma2": {**SHAPE, "query_pre_attn_scalar": 16},
}
OPTIONS = {"limits": Limits(tokens=STEP, verify_tokens=8, sequences=3, outputs=8), "kv_quant": "f32"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model's folder, and the model in transformers."""
    model = make_model(request.param, **FAMILIES[request.param])
    return save(model, tmp_path_factory.mktemp(request.param)), model


def test_logits_and_completions(family: tuple[Path, Any], load: Callable[..., Any]) -> None:
    folder, judge = family
    model = load(folder, **OPTIONS)
    ids = np.random.default_rng(0).integers(0, 97, 200).tolist()
    expected = logits(judge, ids)
    assert np.abs(model.logits(ids) - expected).max() < 1e-4 * np.abs(expected).max()
    for completion in model.generate([ids[:100], ids[:7], ids[:150], ids[:31]], 60, ignore_eos=True):
        whole = completion.prompt_token_ids + completion.token_ids
        rows = logits(judge, whole)[len(completion.prompt_token_ids) - 1 : -1]
        assert completion.token_ids == rows.argmax(-1).tolist()


def test_memory_and_rolling_back(family: tuple[Path, Any], load: Callable[..., Any]) -> None:
    folder, judge = family
    model = load(folder, **OPTIONS)
    ids = np.random.default_rng(1).integers(0, 97, 200).tolist()
    with model.sequence() as sequence:
        sequence.prefill(ids)
        most = blocks_of_window(WINDOW, STEP, 16)
        held = {g.manager.group.window: len(g.held) for g in sequence.table.groups}
        assert held == ({0: 13, WINDOW: most} if 0 in held else {WINDOW: most})
        with sequence.fork() as other:
            other.prefill(ids[:50])
            sequence.truncate(200 - STEP)
            row = sequence.prefill(ids[:5]).logits[0]
            expected = logits(judge, [*ids[: 200 - STEP], *ids[:5]])[-1]
            assert np.abs(row - expected).max() < 1e-4 * np.abs(expected).max()
            expected = logits(judge, [*ids, *ids[:50], 3])[-1]
            assert np.abs(other.step(3).logits[0] - expected).max() < 1e-4 * np.abs(expected).max()
        with pytest.raises(RuntimeError, match="cannot roll back from 173 tokens to 20"):
            sequence.truncate(20)


def test_verify_against_the_source(family: tuple[Path, Any], compiled: Callable[..., Path]) -> None:
    result = verify_package(compiled(family[0], **OPTIONS), family[0])
    assert result.ok, str(result)


def test_the_ledger(family: tuple[Path, Any], compiled: Callable[..., Path]) -> None:
    folder = compiled(family[0], **OPTIONS)
    assert step_ledger(folder, steps=STEP, depth=150, batch=3, repeat=1, threads=1).rows
    with pytest.raises(
        LlmcError, match="33 steps cannot be repeated: layers with a sliding window are rolled back by 32"
    ):
        step_ledger(folder, steps=STEP + 1, depth=150, batch=1, repeat=1, threads=1)
