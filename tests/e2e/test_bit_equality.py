"""Logits are the same bits whatever a sequence is batched with, however it is cut, with any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llmc.runtime.batch import Chunk
from tests.fixtures import REPOSITORY, fixture_path

Logits = npt.NDArray[np.float32]
PICOCODE = REPOSITORY / "examples" / "picocode"


def ragged_logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Logits]:
    """All prompts in one step; the logits of every token of every prompt."""
    sequences = [model.sequence() for _ in prompts]
    engine = sequences[0].engine
    with engine.exclusive():
        chunks = [
            Chunk(sequence.table, np.asarray(prompt, np.int32), len(prompt))
            for sequence, prompt in zip(sequences, prompts, strict=True)
        ]
        rows = engine.forward(chunks).logits.copy()
    for sequence in sequences:
        sequence.free()
    return np.split(rows, np.cumsum([len(p) for p in prompts])[:-1])


def cut_logits(model: Any, prompt: Sequence[int], sizes: Sequence[int]) -> Logits:
    """The prompt read in chunks of the given sizes."""
    rows, at = [], 0
    with model.sequence() as sequence:
        for size in sizes:
            part = list(prompt[at : at + size])
            rows.append(sequence.prefill(part, outputs=len(part)).logits)
            at += size
    assert at == len(prompt)
    return np.concatenate(rows)


def model_folder(name: str) -> Path:
    return PICOCODE if name == "picocode" else fixture_path(f"models/{name}/hf")


@pytest.mark.parametrize("name", ["picocode", "stories260K", "gpt-nano-sort"])
def test_bits(name: str, load: Callable[..., Any]) -> None:
    one = load(model_folder(name), threads=1)
    longest, vocab = one.info["model"]["max_sequence_length"], one.info["model"]["vocab_size"]
    rng = np.random.default_rng(5)
    lengths = [min(n, longest) for n in (29, 1, 17, 3)]
    prompts = [rng.integers(0, vocab, n).tolist() for n in lengths]
    expected = [one.logits(p) for p in prompts]
    for threads in (1, 2, 3):
        model = load(model_folder(name), threads=threads)
        for prompt, want, ragged in zip(prompts, expected, ragged_logits(model, prompts), strict=True):
            n = len(prompt)
            assert np.array_equal(model.logits(prompt), want)
            assert np.array_equal(ragged, want)
            assert np.array_equal(cut_logits(model, prompt, [1] * n), want)
            assert np.array_equal(cut_logits(model, prompt, [n // 2, n - n // 2] if n > 1 else [1]), want)


def test_long_context_in_chunks(load: Callable[..., Any]) -> None:
    """Across segments of attention and chunks of prefill."""
    model = load(PICOCODE, threads=2)
    prompt = np.random.default_rng(6).integers(0, 4096, 700).tolist()
    want = model.logits(prompt)
    assert np.array_equal(cut_logits(model, prompt, [300, 64, 1, 1, 334]), want)
    batch = [prompt[:500], prompt[:60]]
    with model.sequence() as first, model.sequence() as second:
        first.prefill(batch[0])
        second.prefill(batch[1])
        engine = first.engine
        with engine.exclusive():
            tokens = [np.asarray([prompt[n]], np.int32) for n in (500, 60)]
            chunks = [Chunk(s.table, t, 1) for s, t in zip((first, second), tokens, strict=True)]
            rows = engine.forward(chunks).logits.copy()
    assert np.array_equal(rows, want[[500, 60]])
