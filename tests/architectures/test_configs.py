"""Real configurations: those with a description give the right model, the others one clear refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.architectures.loader import descriptions
from llmc.importers.hf import import_model
from llmc.ir.errors import LlmcError
from llmc.ir.types import DType
from llmc.ir.verify import verify
from tests.fixtures import fixture_path, fixtures_root

NAMES = sorted(p.stem for p in (fixtures_root() / "configs").glob("*.json") if p.stem != "expected_params") or ["none"]


def expected(name: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(fixture_path("configs/expected_params.json").read_text())["configs"][name]
    return facts


@pytest.mark.parametrize("name", NAMES)
def test_a_real_configuration(name: str) -> None:
    path = fixture_path("configs") / f"{name}.json"
    facts = expected(name)
    if facts["model_type"] in descriptions():
        model = import_model(path)
        verify(model.graph, "primitive")
        assert model.info.num_parameters == facts.get("params", model.info.num_parameters)
        assert {s.dtype for s in model.weights.values()} <= {DType.BF16, DType.F16, DType.F32}
    else:
        with pytest.raises(LlmcError) as caught:
            import_model(path)
        message = str(caught.value)
        assert path.name in message and len(message) < 400
        assert "no block computes" in message


def test_how_many_real_configurations_are_built(record_property: Callable[[str, object], None]) -> None:
    """The number is printed at the end of a run; the others are refused, as the test above says."""
    fixture_path("configs")
    built = [name for name in NAMES if expected(name)["model_type"] in descriptions()]
    record_property("real configurations built", f"{len(built)} of {len(NAMES)}")
    assert len(built) >= 40


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "c.json"
    path.write_text(json.dumps(config))
    return path


def small(**changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    return {k: v for k, v in {**config, **changes}.items() if v != "absent"}


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None, "some_new_feature": None},
        {"layer_types": ["full_attention", "full_attention"]},
        {"layer_types": ["attention", "full_attention"]},
        {"pretraining_tp": 4, "rope_interleaved": False, "use_cache": False, "attention_dropout": 0.1},
        {"head_dim": None, "num_key_value_heads": None},
        {"dtype": "torch.float16"},
        {"time_limit": None, "initializer_range": float("inf")},
    ],
)
def test_harmless_changes(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert import_model(write(tmp_path, small(**changes))).info.num_layers == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_sink_size": 4},
            "'attention_sink_size' (= 4) is not understood .* nearest key .* 'attention_bias'",
        ),
        ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' (= 50.0) is not understood"),
        ({"sliding_window": 4096}, "'sliding_window' is 4096, which .* do not compute; supported: null"),
        ({"rope_interleaved": True}, "'rope_interleaved' is True, which .* supported: False"),
        ({"is_encoder_decoder": 0}, "'is_encoder_decoder' is 0, which"),
        ({"model_type": "lama"}, "the model type 'lama' has no description; did you mean 'llama'"),
        ({"model_type": None}, "the key 'model_type' is missing; it says which description is meant"),
        ({"model_type": ["llama"]}, "has no description"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "causal language models"),
        ({"architectures": "x"}, "'architectures' must be a list"),
        ({"hidden_act": "silo"}, "the activation 'silo' is not supported; did you mean 'silu'"),
        ({"hidden_size": "absent"}, "the key 'hidden_size' is missing"),
        ({"hidden_size": 24.0}, "'hidden_size' must be a positive integer, given 24.0"),
        ({"hidden_size": True}, "'hidden_size' must be a positive integer, given True"),
        ({"hidden_size": -24}, "'hidden_size' must be a positive integer, given -24"),
        ({"hidden_size": 1 << 40}, "'hidden_size' is 1099511627776, which is absurd"),
        ({"vocab_size": 10**4000}, "'vocab_size' is a number of 13288 bits, which is absurd"),
        ({"num_hidden_layers": 2000}, "2000 layers are absurd"),
        ({"hidden_size": 1 << 22, "num_attention_heads": 64, "intermediate_size": 1 << 22}, "parameters .* absurd"),
        ({"head_dim": 1 << 24}, "an even number of elements, 2 to 65536"),
        ({"head_dim": 5}, "the rotated part of a head must be an even number of elements"),
        ({"hidden_size": 25}, "'hidden_size / num_heads' must be a whole number, given 25 / 4"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "divides by zero"),
        ({"num_key_value_heads": 3}, "number of attention heads must be a multiple .* given 4 and 3"),
        ({"rms_norm_eps": "tiny"}, "'rms_norm_eps' must be a finite number, given 'tiny'"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps' must be a finite number, given nan"),
        ({"attention_bias": 1}, "'attention_bias' must be true or false, given 1"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' must be true or false"),
        ({"dtype": "float8_e4m3fn"}, "the dtype 'float8_e4m3fn' is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer 1 is of type 'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types must be a list of 2 names"),
        ({"eos_token_id": "x"}, "eos_token_id must be an integer or a list"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "the rope type 'su' is not supported"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LlmcError, match=message.replace("(", r"\(").replace(")", r"\)").replace("{", r"\{")) as caught:
        import_model(write(tmp_path, small(**changes)))
    assert "c.json" in str(caught.value) and len(str(caught.value)) < 400


def test_how_weights_are_stored_matters_where_they_are_read(tmp_path: Path) -> None:
    stored = small(quantization_config={"bits": 4})
    assert import_model(write(tmp_path, stored)).info.num_layers == 2
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(LlmcError, match=r"'quantization_config' is \{'bits': 4\}, which .* supported: null"):
        import_model(tmp_path)
    assert import_model(tmp_path, random_weights=True).info.num_layers == 2


def test_two_names_of_one_value(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 1, "vocab_size": 9}
    assert import_model(write(tmp_path, {**config, "hidden_size": 24})).info.hidden_size == 24
    with pytest.raises(LlmcError, match="two names of one value and differ"):
        import_model(write(tmp_path, {**config, "hidden_size": 48}))


def test_sequence_lengths(tmp_path: Path) -> None:
    path = write(tmp_path, small())
    assert import_model(path).graph.symbols["tokens"].max == 64
    assert import_model(path, max_sequence_length=7).graph.symbols["tokens"].max == 7
    assert import_model(path, max_sequence_length=999).info.max_sequence_length == 999
    for wrong in (0, -1, 1 << 30):
        with pytest.raises(LlmcError, match="the maximum sequence length must be 1 to"):
            import_model(path, max_sequence_length=wrong)
    learned = {"model_type": "gpt2", "n_embd": 24, "n_head": 4, "n_layer": 1, "n_positions": 32, "vocab_size": 9}
    with pytest.raises(LlmcError, match=r"1 to 32 .*the positions of the description end there.*, given 33"):
        import_model(write(tmp_path, learned), max_sequence_length=33)
