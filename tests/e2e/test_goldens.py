"""Real trained models: greedy tokens equal to the recorded ones, for every prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import REPOSITORY, fixture_path

Load = Callable[..., Any]
PICOCODE = REPOSITORY / "examples" / "picocode"


def recorded(folder: Path) -> Any:
    return json.loads((folder / "golden.json").read_text())


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105"])
def test_stories(name: str, load: Load) -> None:
    folder = fixture_path(f"models/{name}")
    model = load(folder / "hf")
    cases = recorded(folder)["cases"]
    new = [len(case["greedy_ids"]) - len(case["prompt_ids"]) for case in cases]
    completions = model.generate([case["prompt_ids"] for case in cases], max_new_tokens=max(new))
    for case, count, completion in zip(cases, new, completions, strict=True):
        assert case["prompt_ids"] + completion.token_ids[:count] == case["greedy_ids"], case["prompt"]
        assert model.tokenizer.encode(case["prompt"]) == case["prompt_ids"]


def test_sort(load: Load) -> None:
    folder = fixture_path("models/gpt-nano-sort")
    cases = recorded(folder)
    completions = load(folder / "hf").generate(cases["inputs"], max_new_tokens=6)
    assert [c.token_ids for c in completions] == cases["outputs"]


def test_picocode(load: Load) -> None:
    model = load(PICOCODE)
    for case in recorded(PICOCODE)["cases"]:
        prompt = case["prompt_ids"]
        assert model.tokenizer.encode(case["prompt"]) == prompt
        completion = model.generate(prompt, max_new_tokens=len(case["greedy_ids"]) - len(prompt))
        assert prompt + completion.token_ids == case["greedy_ids"], case["prompt"]
        assert completion.text == case["text"]


def test_picocode_perplexity(load: Load) -> None:
    text = (fixture_path("models/picocode") / "val.txt").read_text()
    expected = recorded(PICOCODE)["perplexity"]
    value = load(PICOCODE).perplexity(text, context=expected["context"])
    assert value == pytest.approx(expected["value"], rel=1e-3)  # the KV cache is f16, the record's was f32
