"""Which families GPU packages take, and that these compute what transformers does, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.importers.hf import import_model
from llmc.inspection import read_graph
from llmc.ir.errors import NoKernel
from llmc.report.verification import first_divergent
from tests.architectures.families import FAMILIES
from tests.backends.triton.interpreted_package import compile_interpreted, load_interpreted
from tests.fixtures import REPOSITORY
from tests.tiny_models import difference, logits, make_model, save

TOLERANCE = 1e-4
PROMPT = np.random.default_rng(0).integers(0, 503, 11).tolist()
"""Longer than every window."""

WITHOUT_KERNELS = {
    "mixtral": "softmax",
    "qwen3_moe": "softmax",
    "deepseek_v2": "slice",
    "deepseek_v2, groups, one latent": "slice",
    "deepseek_v3": "slice",
    "gpt_oss": "softmax",
}
"""Families with experts or latents: the op that the refusal names."""


def two_layers(family: str) -> dict[str, Any]:
    """The family's configuration, with fewer layers: the interpreter takes a millisecond for every program."""
    config = dict(FAMILIES[family].config)
    for key, value in config.items():
        if key in ("num_hidden_layers", "n_layer", "n_layers"):
            config[key] = 2
        elif isinstance(value, list):
            config[key] = value[:2]
    return config


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITHOUT_KERNELS])
def test_a_package(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, then tokens one by one: logits in float32, and greedy tokens."""
    case = FAMILIES[family]
    judge = make_model(case.model_type, seed=1, **two_layers(family))
    folder = save(judge, tmp_path / "model")
    sources = compile_interpreted(monkeypatch, folder, tmp_path / "package", max_sequence_length=case.longest)
    model, _ = load_interpreted(tmp_path / "package", sources)
    with model.sequence() as sequence:
        steps = [sequence.prefill(PROMPT).copy()]
        for _ in range(2):
            steps.append(sequence.step(int(steps[-1].greedy[0])).copy())
    chosen = [int(step.greedy[0]) for step in steps]
    expected = logits(judge, [*PROMPT, *chosen])[len(PROMPT) - 1 : -1]
    assert difference(np.concatenate([step.logits for step in steps]), expected) < TOLERANCE
    assert chosen == expected.argmax(-1).tolist()


def test_windows_over_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a window and without, each group with block tables of its own; what a window has left is given back.

    A step takes 32 tokens.
    """
    case = FAMILIES["gemma2"]
    judge = make_model(case.model_type, seed=1, **two_layers("gemma2"))
    folder = save(judge, tmp_path / "model")
    model, _ = load_interpreted(tmp_path / "p", compile_interpreted(monkeypatch, folder, tmp_path / "p"))
    prompt = np.random.default_rng(1).integers(0, 503, 36).tolist()
    completion, other = model.generate([prompt, prompt[:3]], max_new_tokens=3, ignore_eos=True)
    for given, chosen in ((prompt, completion.token_ids), (prompt[:3], other.token_ids)):
        expected = logits(judge, [*given, *chosen])[len(given) - 1 : -1]
        assert chosen == expected.argmax(-1).tolist()


def test_every_node_is_compared_with_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of queries and keys in bf16, before keys in 8 bits, launch by launch."""
    folder = save(make_model("qwen3", **two_layers("qwen3")).bfloat16(), tmp_path / "model")
    sources = compile_interpreted(monkeypatch, folder, tmp_path / "p", quant="q4g128", kv_quant="fp8")
    model, _ = load_interpreted(tmp_path / "p", sources)
    report = model.verify()
    assert report.ok, str(report)
    graph, load = read_graph(tmp_path / "p", "prefill"), import_model(folder).weights.load
    assert first_divergent(model, graph, load, report.tolerance) == ""


def test_the_page_names_what_is_refused() -> None:
    text = " ".join((REPOSITORY / "docs" / "gpu.md").read_text(encoding="utf-8").split())
    refused = sorted({FAMILIES[family].model_type for family in WITHOUT_KERNELS})
    assert f"have no kernels yet ({', '.join(refused)})" in text


@pytest.mark.parametrize("family", WITHOUT_KERNELS)
def test_what_has_no_kernel_is_refused(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts and latents."""
    case = FAMILIES[family]
    folder = save(make_model(case.model_type, **two_layers(family)), tmp_path / "model")
    with pytest.raises(NoKernel, match=f"^no GPU kernel for {WITHOUT_KERNELS[family]}"):
        compile_interpreted(monkeypatch, folder, tmp_path / "package", max_sequence_length=case.longest)
