"""Inverse frequencies against transformers' own, and the ways in which rope keys can be wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmc.architectures.loader import common
from llmc.architectures.rope import RopeParameters, inverse_frequencies, read_rope
from llmc.architectures.settings import ConfigurationError, Settings
from tests.tiny_models import transformers

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "bands": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bands, small": {
        "rope_type": "llama3", "factor": 32, "low_freq_factor": 2, "high_freq_factor": 5,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 16.0, "original_max_position_embeddings": 4096},
    "yarn, mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
        "mscale_all_dim": 0.8, "beta_fast": 32, "beta_slow": 1,
    },
    "yarn, not truncated": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False,
        "beta_fast": 32.0, "beta_slow": 1.0,
    },
    "yarn, attention factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "attention_factor": 1.25
    },
    "yarn, without original length": {"rope_type": "yarn", "factor": 4.0},
}  # fmt: skip


def read(config: dict[str, Any], max_positions: int = 32768) -> RopeParameters:
    return read_rope(Settings(config, "config.json", {}), common().rope_types, max_positions)


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("head_dim", [12, 20, 64, 80, 128, 256])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1234.5])
def test_frequencies_are_those_of_transformers(case: str, head_dim: int, theta: float) -> None:
    keys: dict[str, Any] = {"rope_type": case.split(",")[0], "rope_theta": theta, **PARAMETERS[case]}
    config = transformers.LlamaConfig(
        hidden_size=head_dim * 2, num_attention_heads=2, max_position_embeddings=32768, rope_parameters=dict(keys)
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    frequencies, scaling = inverse_frequencies(read({"rope_parameters": keys}), head_dim, 64)
    assert frequencies.dtype == np.float32
    # Two units in the last place of the frequency before scaling: libraries round a float32 power differently.
    plain, _ = inverse_frequencies(read({"rope_theta": theta}), head_dim, 64)
    error = np.abs(frequencies - rotary.inv_freq.numpy())
    assert (error <= 2 * np.spacing(plain if "bands" in case else frequencies)).all()
    assert scaling == pytest.approx(rotary.attention_scaling, rel=1e-12)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ({"rope_theta": 500.0, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 500.0}}),
        (
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 128},
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}},
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_theta": 7.0},
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 7.0}},
        ),
        (
            {"partial_rotary_factor": 0.25},
            {"rope_parameters": {"partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.5},
        ),
        ({"rope_theta": 9.0}, {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 9.0}}}),
    ],
)
def test_both_spellings_mean_the_same(older: dict[str, Any], newer: dict[str, Any]) -> None:
    ours, theirs = read(older), read(newer)
    assert (ours.scaling, ours.theta, ours.partial_rotary_factor) == (
        theirs.scaling, theirs.theta, theirs.partial_rotary_factor
    )  # fmt: skip
    assert dict(ours.values) == dict(theirs.values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": {"type": "liner", "factor": 2.0}}, "did you mean 'linear'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs the key 'factor'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "facto": 1.0}},
            "no key 'facto'; did you mean 'factor'",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "factor must be positive"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "must be a finite number, given '2'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "must be a finite number"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": 3}, "must be a table"),
        ({"rope_theta": 0}, "rope_theta must be positive"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta is 6.0 here and 5.0 beside it"),
        ({"rope_parameters": {"rope_theta": 6.0}, "rope_scaling": {"rope_theta": 5.0}}, "both set and differ"),
        ({"partial_rotary_factor": 1.5}, "must lie in"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor must be less",
        ),
    ],
)
def test_wrong_keys_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(config)
