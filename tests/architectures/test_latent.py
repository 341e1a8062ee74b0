"""Latent attention against transformers' eager models, interpreted in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmc.architectures.loader import parse_description
from llmc.architectures.settings import ConfigurationError
from llmc.importers.hf import import_model
from llmc.ir.verify import verify
from tests.architectures.test_against_transformers import TOLERANCE, prompt, run
from tests.latent_models import CASES, SIZES, write_description
from tests.tiny_models import difference, logits, make_model, save


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    theirs = make_model(model_type, **{**SIZES, **changes})
    ours = import_model(save(theirs, tmp_path), architecture=write_description(tmp_path))
    verify(ours.graph, "primitive")
    assert ours.info.num_parameters == theirs.num_parameters()
    token_ids = prompt(47)
    assert difference(run(ours, token_ids), logits(theirs, token_ids)) < TOLERANCE


def refused(tmp_path: Path, **changes: Any) -> str:
    config = {**SIZES, "rms_norm_eps": 1e-6, "hidden_act": "silu", **changes}
    description = parse_description(write_description(tmp_path).read_bytes(), "latent.toml")
    with pytest.raises(ConfigurationError) as raised:
        description.apply(json.loads(json.dumps(config)), "config.json")
    return str(raised.value)


def test_grouped_heads_are_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, num_attention_heads=6, num_key_value_heads=3)
    assert message.endswith("must be equal, given 6 and 3")


def test_a_latent_is_a_size_or_absent(tmp_path: Path) -> None:
    assert "'q_lora_rank' must be an integer of 0 or more, given -1" in refused(tmp_path, q_lora_rank=-1)
    assert "'kv_lora_rank' must be a positive integer, given 0" in refused(tmp_path, kv_lora_rank=0)


def test_the_rotated_part_must_be_the_models(tmp_path: Path) -> None:
    text = write_description(tmp_path).read_text().replace('head_dim = "rope_dim"', 'head_dim = "2 * rope_dim"')
    (tmp_path / "other.toml").write_text(text)
    theirs = make_model("deepseek_v3", **SIZES)
    with pytest.raises(ConfigurationError, match="needs 6 elements to be rotated; 12 are"):
        import_model(save(theirs, tmp_path), architecture=tmp_path / "other.toml")
