"""A cache of 8-bit codes: half the memory, logits near the float64 model's, and the same bits however it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.report.verification import verify_package
from tests.e2e.test_bit_equality import cut_logits, model_folder, ragged_logits


@pytest.mark.parametrize("name", ["picocode", "gpt-nano-sort"])
def test_verify_against_the_source(name: str, compiled: Callable[..., Path]) -> None:
    result = verify_package(compiled(model_folder(name), kv_quant="int8"), model_folder(name))
    assert result.ok, str(result)
    assert 1e-5 < result.against["error"] < 4e-2  # codes round: no cache of floats is as far


@pytest.mark.parametrize("threads", [1, 2])
def test_bits(threads: int, load: Callable[..., Any]) -> None:
    model = load(model_folder("picocode"), threads=threads, kv_quant="int8")
    assert model.info["quantization"]["kv"] == "i8"
    prompts = [np.random.default_rng(n).integers(0, 4096, n).tolist() for n in (300, 1, 17, 29)]
    expected = [model.logits(p) for p in prompts]
    for want, ragged in zip(expected[1:], ragged_logits(model, prompts[1:]), strict=True):
        assert np.array_equal(ragged, want)
    for prompt, want in zip(prompts, expected, strict=True):
        n = len(prompt)
        sizes = [*[60] * ((n - 6) // 60), (n - 6) % 60, 1, 1, 4] if n > 6 else [1] * n
        assert np.array_equal(cut_logits(model, prompt, sizes), want)


def test_memory_is_nearly_half(load: Callable[..., Any]) -> None:
    """A head of 32 elements takes 64 bytes in f16; as codes with a scale, 36."""
    folder = model_folder("picocode")
    codes, halves = (load(folder, kv_quant=q).info["sizes"]["kv_bytes_per_token"] for q in ("int8", "f16"))
    assert codes * 64 == halves * 36


def test_forked_sequences_keep_their_scales(load: Callable[..., Any]) -> None:
    """A block that two sequences share is copied with its scales before one of them writes to it."""
    model = load(model_folder("picocode"), kv_quant="int8")
    prompt = np.random.default_rng(3).integers(0, 4096, 21).tolist()
    with model.sequence() as first:
        first.prefill(prompt)
        with first.fork() as second:
            got = [s.prefill([token]).logits[-1].copy() for s, token in ((first, 7), (second, 9))]
            more = [s.prefill([5]).logits[-1].copy() for s in (first, second)]
    for token, row, following in zip((7, 9), got, more, strict=True):
        want = model.logits([*prompt, token, 5])
        assert np.array_equal(row, want[-2])
        assert np.array_equal(following, want[-1])
