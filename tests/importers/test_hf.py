"""Whole folders: bad input of every kind gives one clear error; side files are read; nothing else escapes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from llmc.importers.hf import import_model
from llmc.importers.json_file import ImportFailure
from llmc.ir.errors import LlmcError

CONFIG: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": -1, "dtype": "float32",
}  # fmt: skip
TOKENIZER = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "post_processor": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small complete folder; its weights are the importer's own random ones."""
    write(tmp_path, "config.json", CONFIG)
    model = import_model(tmp_path, random_weights=True)
    save_file({label: model.weights.load(label) for label in model.weights}, tmp_path / "model.safetensors")
    return tmp_path


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def change(folder: Path, **tensors: Any) -> None:
    """Replace tensors (`__` for a dot) of model.safetensors; None removes one."""
    arrays: dict[str, Any] = load_file(folder / "model.safetensors")
    arrays.update({k.replace("__", "."): v for k, v in tensors.items()})
    save_file({k: v for k, v in arrays.items() if v is not None}, folder / "model.safetensors")


def failure(path: Path, **options: Any) -> str:
    with pytest.raises(LlmcError) as caught:
        import_model(path, **options)
    message = str(caught.value)
    assert 20 < len(message) < 500 and "\n" not in message
    return message


def test_a_complete_folder(folder: Path) -> None:
    model = import_model(str(folder))
    assert model.info.num_parameters == sum(np.prod(s.shape) for s in model.weights.values())
    assert (model.info.bos_token_id, model.info.eos_token_ids, model.info.pad_token_id) == (1, (2,), None)
    assert model.tokenizer_files == {} and model.info.chat_templates == {}
    random = import_model(folder / "config.json")
    assert all((model.weights.load(label) == random.weights.load(label)).all() for label in random.weights)


def test_paths(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    assert "it does not exist" in failure(empty / "none")
    assert "it does not exist" in failure(empty / "none.json")
    assert "it has no config.json" in failure(empty)
    assert "it is a file" in failure(folder / "model.safetensors")
    assert "name too long" in failure(empty / ("x" * 300)).lower()
    write(empty, "config.json", CONFIG)
    assert "neither model.safetensors nor model.safetensors.index.json (other weights: none)" in failure(empty)
    os.mkfifo(empty / "model.safetensors")
    assert "no regular file" in failure(empty)


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for size in (0, 5, 100, len(data) - 1):
        path.write_bytes(data[:size])
        assert "model.safetensors" in (message := failure(folder)) and "truncated" in message


def test_wrong_tensors(folder: Path) -> None:
    change(folder, model__norm__weight=np.ones(23, np.float32))
    assert "tensor 'model.norm.weight': the shape must be [24], given [23]" in failure(folder)
    change(folder, model__norm__weight=np.ones(24, np.int32))
    assert "tensor 'model.norm.weight': the dtype must be F32, F16 or BF16, given I32" in failure(folder)
    change(folder, model__norm__weight=None, model__norm__weigth=np.ones(24, np.float32))
    assert "lacks the tensor 'model.norm.weight' [24]; the nearest that it has is 'model.norm.weigth'" in failure(
        folder
    )
    change(folder, model__norm__weight=np.ones(24, np.float32))
    assert "does not use the tensor 'model.norm.weigth'" in failure(folder)
    change(folder, model__norm__weigth=None, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(3, np.float32))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in import_model(folder).weights


def test_tied_heads(folder: Path) -> None:
    write(folder, "config.json", {**CONFIG, "tie_word_embeddings": True})
    assert "are stored both and differ" in failure(folder)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=table)
    assert "lm_head.weight" not in import_model(folder).weights
    change(folder, model__embed_tokens__weight=None)
    assert "model.embed_tokens.weight" not in import_model(folder).weights
    change(folder, lm_head__weight=None)
    assert "lacks the tensor 'model.embed_tokens.weight'" in failure(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no valid JSON"), ("[]", "must hold a JSON object"), ("{}", "'model_type' is missing"),
     ('{"a": 1, "a": 2}', "the key 'a' stands twice"), ('{"a": ' + "[" * 90 + "]" * 90 + "}", "nested more than 64"),
     ('{"vocab_size": ' + "9" * 5000 + "}", "no valid JSON"), ('"' + "x" * (1 << 20) + '"', "more than 1048576 bytes")],
)  # fmt: skip
def test_malformed_configurations(folder: Path, text: str, message: str) -> None:
    write(folder, "config.json", text)
    assert message in (given := failure(folder)) and "config.json" in given


def test_tokenizer_files(folder: Path) -> None:
    write(folder, "tokenizer.json", TOKENIZER)
    write(folder, "tokenizer_config.json", {"add_bos_token": False, "chat_template": "{{ messages }}"})
    model = import_model(folder)
    assert set(model.tokenizer_files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert json.loads(model.tokenizer_files["tokenizer.json"]) == TOKENIZER
    assert model.info.chat_templates == {"default": "{{ messages }}"} and not model.info.add_bos
    write(folder, "chat_template.jinja", "from a file")
    assert import_model(folder).info.chat_templates["default"] == "from a file"
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert import_model(folder).info.chat_templates == {"default": "a", "tool_use": "b"}
    for wrong in (3, [3], [{"name": "x"}], [{"name": 1, "template": "x"}]):
        write(folder, "tokenizer_config.json", {"chat_template": wrong})
        assert "chat_template" in failure(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "\\ud800"}')
    assert "no valid Unicode" in failure(folder)


def test_wrong_tokenizers(folder: Path) -> None:
    write(folder, "tokenizer.json", "{")
    assert "tokenizer.json is no valid JSON" in failure(folder)
    write(folder, "tokenizer.json", {"version": "1.0"})
    assert "has no 'model'" in failure(folder)


@pytest.mark.parametrize(
    ("post_processor", "adds"), [(None, False), ({"single": [{"SpecialToken": {"id": "<s>"}}]}, True)]
)
def test_whether_a_beginning_token_is_added(folder: Path, post_processor: object, adds: bool) -> None:
    write(folder, "tokenizer.json", {**TOKENIZER, "post_processor": post_processor})
    assert import_model(folder).info.add_bos is adds


def test_generation_configuration(folder: Path) -> None:
    write(
        folder, "generation_config.json", {"eos_token_id": [7, 8, 999, 7], "temperature": 0.6, "top_k": None, "x": {}}
    )
    info = import_model(folder).info
    assert info.eos_token_ids == (7, 8) and info.bos_token_id == 1 and dict(info.generation) == {"temperature": 0.6}
    write(folder, "generation_config.json", {"eos_token_id": "</s>"})
    assert "generation_config.json: eos_token_id must be an integer" in failure(folder)


def test_nothing_is_loaded(folder: Path) -> None:
    import_model(folder, random_weights=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ImportFailure):
        import_model(folder)
    huge = {**CONFIG, "hidden_size": 1 << 14, "vocab_size": 1 << 17, "intermediate_size": 1 << 16}
    write(folder, "config.json", {**huge, "num_hidden_layers": 120})
    assert import_model(folder / "config.json").weights.bytes > 1e12


rope_keys = st.sampled_from(
    ["rope_type", "type", "factor", "rope_theta", "beta_fast", "low_freq_factor", "high_freq_factor", "x",
     "original_max_position_embeddings"]
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["silu", "llama", "gpt2", "linear", "yarn", "dynamic", "llama3", "float16"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(rope_keys, inner, max_size=5),
    max_leaves=5,
)  # fmt: skip
keys = st.sampled_from(
    [*CONFIG, "rope_scaling", "rope_parameters", "rope_theta", "head_dim", "hidden_act", "rms_norm_eps", "layer_types",
     "attention_bias", "tie_word_embeddings", "architectures", "torch_dtype", "n_embd", "n_head", "n_layer", "n_inner",
     "scale_attn_weights", "partial_rotary_factor", "original_max_position_embeddings"]
) | st.text(max_size=4)  # fmt: skip


@settings(max_examples=300)
@given(changes=st.dictionaries(keys, values, max_size=4), drop=st.sets(st.sampled_from(sorted(CONFIG)), max_size=2))
def test_no_configuration_escapes(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], drop: set[str]
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "c.json"
    path.write_text(json.dumps({k: v for k, v in {**CONFIG, **changes}.items() if k not in drop or k in changes}))
    try:
        model = import_model(path)
    except LlmcError as error:
        assert 20 < len(str(error)) < 500
        return
    assert model.weights.num_parameters < 1 << 42


@given(st.binary(max_size=80))
def test_no_bytes_escape(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "c.json"
    path.write_bytes(data)
    with pytest.raises(LlmcError):
        import_model(path)
