"""Logits and perplexity of given tokens."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .batch import Float32
from .engine import Engine
from .sequence import Sequence


def all_logits(engine: Engine, token_ids: list[int]) -> Float32:
    """The logits after each token, f32[len(token_ids), vocab], by the entry points that generation uses."""
    with engine.exclusive(), Sequence(engine) as sequence:
        return sequence.prefill(token_ids, outputs=len(token_ids)).logits


def perplexity(engine: Engine, token_ids: list[int], context: int) -> float:
    """exp of the mean negative log-likelihood of every token but the first.

    The tokens are read in windows of `context`, one after another without overlap, each from an empty state; a window
    predicts the token after each of its own, so the last prediction of a window is the first token of the next one, and
    every token but the first of all is predicted once. (In other words: inputs `ids[i : i + context]`, targets
    `ids[i + 1 : i + 1 + context]`, i = 0, context, 2 * context, ...)
    """
    total, vocab_size = 0.0, engine.executor.vocab_size
    part_length = max(1, min(engine.executor.limits.outputs, engine.max_tokens, (1 << 26) // vocab_size))
    for start in range(0, len(token_ids) - 1, context):
        stop = min(start + context, len(token_ids) - 1)
        with engine.exclusive(), Sequence(engine) as sequence:
            for at in range(start, stop, part_length):
                inputs = token_ids[at : min(at + part_length, stop)]
                logits = sequence.prefill(inputs, outputs=len(inputs)).logits
                total += negative_log_likelihood(logits, token_ids[at + 1 : at + 1 + len(inputs)])
    return math.exp(total / (len(token_ids) - 1))


def negative_log_likelihood(logits: Float32, targets: list[int]) -> float:
    """The sum over rows of -log softmax(logits)[target], in float64."""
    wide: NDArray[np.float64] = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    normalizers = np.log(np.exp(wide).sum(axis=1))
    return float((normalizers - wide[np.arange(len(targets)), targets]).sum())
