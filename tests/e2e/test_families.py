"""Every family's package for this CPU against transformers' eager model: logits in float32, and greedy tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.architectures.loader import descriptions
from tests.architectures import table
from tests.architectures.families import FAMILIES
from tests.e2e.test_bit_equality import ragged_logits
from tests.tiny_models import difference, logits, make_model, save

TOLERANCE = 1e-4
LENGTHS = (23, 1, 9, 40)
"""Of prompts: windows are shorter, and a step has at most 16 tokens of one."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_package(family: str, tmp_path: Path, load: Callable[..., Any], accept: bool) -> None:
    """Prefill, token by token across a window's edge, a ragged batch; then greedy tokens."""
    case = FAMILIES[family]
    judge = make_model(case.model_type, seed=1, **case.config)
    folder = save(judge, tmp_path / "model")
    model = load(folder, max_sequence_length=case.longest)
    prompts = [np.random.default_rng(n).integers(0, 503, n).tolist() for n in LENGTHS if n >= case.shortest]
    expected = [logits(judge, p) for p in prompts]
    with model.sequence() as sequence:
        stepwise = np.stack([sequence.step(token).logits[0] for token in prompts[0]])
    short = [p for p in prompts if len(p) < 30]  # a step gives so many rows at most
    found = [*(model.logits(p) for p in prompts), stepwise, *ragged_logits(model, short)]
    judged = [*expected, expected[0], *(w for p, w in zip(prompts, expected, strict=True) if p in short)]
    error = max(difference(given, want) for given, want in zip(found, judged, strict=True))
    assert error < TOLERANCE
    for completion in model.generate(prompts[:2], max_new_tokens=12, ignore_eos=True):
        whole = completion.prompt_token_ids + completion.token_ids
        ahead = logits(judge, whole)[len(completion.prompt_token_ids) - 1 : -1]
        assert completion.token_ids == ahead.argmax(-1).tolist()
    check_row(family, folder, error, accept)


@pytest.mark.parametrize("family", ["gpt_oss", "bloom", "deepseek_v2"])
def test_16_bit_weights(family: str, tmp_path: Path, load: Callable[..., Any]) -> None:
    """Packages hold the checks that were made for them."""
    case = FAMILIES[family]
    folder = save(make_model(case.model_type, seed=2, **case.config).bfloat16(), tmp_path / "model")
    report = load(folder).verify()
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("family", "quant"),
    [("gemma2", "q8"), ("deepseek_v3", "q8"), ("falcon, key heads for groups", "q4"), ("qwen3_moe", "q4")],
)
def test_quantized_weights(family: str, quant: str, tmp_path: Path, load: Callable[..., Any]) -> None:
    """In float32 beside the codes: what is left are roundings of the last place, which seldom change a code."""
    case = FAMILIES[family]
    model = load(save(make_model(case.model_type, seed=2, **case.config), tmp_path / "model"), quant=quant)
    report = model.verify()
    assert report.ok, str(report)


def check_row(family: str, folder: Path, error: float, accept: bool) -> None:
    """docs/architectures.md has a row for the family that is still true."""
    case = FAMILIES[family]
    config = json.loads((folder / "config.json").read_text())
    applied = descriptions()[case.model_type].apply(config, "config.json")
    rows = dict(table.rows_by_family())
    if accept:
        rows[family] = table.family_row(family, case.model_type, applied, f"{error:.0e}")
        known = [rows[name] for name in FAMILIES if name in rows]
        table.rewrite("The families", "\n".join([table.FAMILY_HEAD, *known]))
        return
    recorded = rows[family].split("|")[-2].strip()
    assert rows[family] == table.family_row(family, case.model_type, applied, recorded), "run pytest --accept"
    assert float(recorded) < TOLERANCE


def test_the_table_has_no_other_rows() -> None:
    assert list(table.rows_by_family()) == list(FAMILIES)


def test_the_page_names_every_block(accept: bool) -> None:
    if accept:
        table.rewrite_blocks()
    assert table.blocks_of_page() == table.blocks(), "run pytest --accept"
