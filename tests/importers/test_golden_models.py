"""Real trained models: logits and greedy tokens of the float64 interpreter against the recorded ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from llmc.importers.hf import ImportedModel, import_model
from llmc.ir.interpret import interpret
from llmc.ir.text import parse
from llmc.ir.verify import verify
from tests.fixtures import fixture_path

STEPS = 4  # the whole prompt is computed again for each


def last_logits(model: ImportedModel, params: dict[str, Any], token_ids: list[int]) -> np.ndarray[Any, Any]:
    inputs = {"token_ids": np.array(token_ids), "positions": np.arange(len(token_ids))}
    row: np.ndarray[Any, Any] = interpret(model.graph, inputs, params).outputs["logits"][-1]
    return row


def load(folder: str) -> tuple[ImportedModel, dict[str, Any], dict[str, Any]]:
    path = fixture_path(f"models/{folder}")
    model = import_model(path)
    verify(model.graph, "primitive")
    golden = path / "golden.json" if (path / "golden.json").exists() else path.parent / "golden.json"
    return model, {label: model.weights.load(label) for label in model.weights}, json.loads(golden.read_text())


@pytest.mark.parametrize("folder", ["stories260K/hf", "babyllama-tok105/hf", "picocode", "picocode-draft"])
def test_greedy_tokens(folder: str) -> None:
    model, params, golden = load(folder)
    for case in golden["cases"]:
        ids, length = case["greedy_ids"], len(case["prompt_ids"])
        for step in range(length, min(length + STEPS, len(ids))):
            logits = last_logits(model, params, ids[:step])
            assert logits.argmax() == ids[step]
            if step == length and "logits_after_prompt" in case:
                expected = np.array(case["logits_after_prompt"])
                assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


def test_sorting() -> None:
    model, params, golden = load("gpt-nano-sort/hf")
    for given, expected in list(zip(golden["inputs"], golden["outputs"], strict=True))[::90]:
        ids = list(given)
        for _ in range(6):
            ids.append(int(last_logits(model, params, ids).argmax()))
        assert ids[6:] == expected == sorted(given)


def test_bf16_shards_are_the_rounded_weights() -> None:
    whole, shards = (import_model(fixture_path(f"models/stories260K/{f}")) for f in ("hf", "hf_bf16_sharded"))
    assert set(whole.weights) == set(shards.weights) and whole.info.max_sequence_length == 512
    for label, source in shards.weights.items():
        assert (source.load() == whole.weights.load(label).astype(source.dtype.numpy)).all()


def test_what_a_package_is_told() -> None:
    info = import_model(fixture_path("models/picocode")).info
    assert (info.architecture, info.vocab_size, info.hidden_size, info.num_layers) == ("llama", 4096, 256, 6)
    assert (info.bos_token_id, info.eos_token_ids, info.pad_token_id, info.add_bos) == (1, (2,), 0, True)
    assert info.max_sequence_length == 1024 and info.num_parameters == 5475584


@pytest.mark.parametrize("folder", ["picocode", "gpt-nano-sort/hf"])
def test_the_graph_reads_back_from_its_text(folder: str) -> None:
    graph = import_model(fixture_path(f"models/{folder}")).graph
    assert parse(str(graph), graph.constants) == graph
    assert "repeat layer" in str(graph)
