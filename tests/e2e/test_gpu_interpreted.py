"""Whole models through the plan that a GPU runs, kernel by kernel in Triton's interpreter."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.importers.hf import import_model
from llmc.inspection import read_graph
from llmc.packages import open_package
from llmc.report.verification import first_divergent
from tests import tiny_models
from tests.backends.triton.interpreted_package import compile_interpreted, load_interpreted
from tests.conftest import Compile

PROMPTS = ([5, 700, 33, 1, 8, 99], [42, 7], [1000])
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 500}


@pytest.fixture(scope="module")
def f32_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("f32") / "model"
    return tiny_models.save(tiny_models.make_model("llama", num_key_value_heads=1), folder)


@pytest.fixture(scope="module")
def bf16_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.make_model("llama", **SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    return tiny_models.save(model.bfloat16(), tmp_path_factory.mktemp("bf16") / "model")


def test_a_model_in_f32_gives_the_tokens_of_the_cpu_backend(
    f32_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: Compile
) -> None:
    sources = compile_interpreted(monkeypatch, f32_model, tmp_path / "package")
    model, device = load_interpreted(tmp_path / "package", sources)
    cpu = open_package(compiled(f32_model, target="cpu:x86-64-v3", limits=None)).load(threads=1)
    prompts = [list(p) for p in PROMPTS]
    greedy = {"max_new_tokens": 6, "ignore_eos": True}
    assert _tokens(model.generate(prompts, **greedy)) == _tokens(cpu.generate(prompts, **greedy))
    assert device.replays == 6  # one for each step of all prompts together
    sampled: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.9, "seed": 11, "ignore_eos": True}
    for options in ({}, {"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.05, "top_k": 50}, {"repetition_penalty": 1.3}):
        assert _tokens(model.generate(prompts, **sampled, **options)) == _tokens(
            cpu.generate(prompts, **sampled, **options)
        )
    logits, wanted = model.logits(PROMPTS[0]), cpu.logits(list(PROMPTS[0]))
    assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_a_model_in_bf16_is_that_of_transformers(
    bf16_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_interpreted(tmp_path / "p", compile_interpreted(monkeypatch, bf16_model, tmp_path / "p"))
    judge = tiny_models.load(bf16_model)  # the same weights, calculated with in f32
    ids = np.random.default_rng(0).integers(0, 500, 24).tolist()
    expected = tiny_models.logits(judge, ids)
    error = np.abs(model.logits(ids) - expected).max() / np.abs(expected).max()
    naive = np.abs(tiny_models.logits(judge.bfloat16(), ids) - expected).max() / np.abs(expected).max()
    assert error <= 2 * naive


@pytest.mark.parametrize(
    ("quant", "kv_quant"),
    [("none", None), ("none", "fp8"), ("none", "int8"), ("q4", "int8"), ("q8", None), ("q4g128", "fp8"), ("fp8", None)],
)
def test_packages_hold_their_own_checks(
    bf16_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str, kv_quant: str | None
) -> None:
    sources = compile_interpreted(monkeypatch, bf16_model, tmp_path / "p", quant=quant, kv_quant=kv_quant)
    model, _ = load_interpreted(tmp_path / "p", sources)
    report = model.verify()
    assert report.ok, str(report)


def test_chunks_and_batches_do_not_change_what_comes_out(
    bf16_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More tokens than a step takes, sequences of unequal lengths, and a fork: what each gets alone, up to rounding."""
    model, device = load_interpreted(tmp_path / "p", compile_interpreted(monkeypatch, bf16_model, tmp_path / "p"))
    long = np.random.default_rng(1).integers(0, 500, 50).tolist()  # of 32 that a step takes
    together = model.generate([long, [7, 8], [9]], max_new_tokens=3, ignore_eos=True)
    alone = [model.generate(p, max_new_tokens=3, ignore_eos=True) for p in (long, [7, 8], [9])]
    assert _tokens(together) == _tokens(alone)
    with model.sequence() as sequence:
        sequence.prefill(long[:20])
        with sequence.fork() as other:
            first, second = sequence.step(5).copy(), other.step(5).copy()
    assert np.array_equal(first.logits, second.logits)
    names = [name.rsplit("_", 1)[0] for name in device.launched]
    runs = {name for name, _ in itertools.groupby(names)}
    assert {"linear", "attention_decode", "attention_prefill", "select_token", "embedding", "norm"} <= runs


def test_every_node_is_compared_with_float64(bf16_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `llmc verify --against` does with a GPU package: its launches one by one; and it finds the one that errs."""
    sources = compile_interpreted(monkeypatch, bf16_model, tmp_path / "p", quant="q4g128", kv_quant="fp8")
    model, _ = load_interpreted(tmp_path / "p", sources)
    graph, load = read_graph(tmp_path / "p", "prefill"), import_model(bf16_model).weights.load
    tolerance = model.verify().tolerance
    assert first_divergent(model, graph, load, tolerance) == ""

    def wrong(name: str) -> Any:
        return -load(name) if name == "model.layers.1.mlp.down_proj.weight" else load(name)

    assert first_divergent(model, graph, wrong, tolerance).startswith("block_linear at model.layers.1.mlp.down_proj")


def _tokens(completions: Any) -> list[list[int]]:
    return [completion.token_ids for completion in completions]
