"""From a row of logits to the next token: pure functions, the same draws whatever a sequence is batched with.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p, one draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import GenerationOptions
from .errors import ModelError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four random 32-bit words from a counter of four and a key of two.

    Takes Python integers or uint64 arrays that hold 32-bit words. Source: Salmon et al., "Parallel random numbers: as
    easy as 1, 2, 3" (SC 2011), and its library Random123.
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> 32) ^ b ^ k, second & _MASK, (first >> 32) ^ d ^ m, first & _MASK
        k, m = (k + _WEYL[0]) & _MASK, (m + _WEYL[1]) & _MASK
    return a, b, c, d


def uniform(seed: int, sequence: int, position: int) -> float:
    """The one draw, in (0, 1), for the token at `position` of a sequence. `seed` has 64 bits, the others 32."""
    word = philox((position & _MASK, sequence & _MASK, 0, 0), (seed & _MASK, seed >> 32))[0]
    return float((word + 0.5) / 4294967296.0)


def penalize(logits: NDArray[np.float32], seen: NDArray[np.intp], penalty: float) -> NDArray[np.float32]:
    """Logits f32[vocab] where those of the token ids `seen` are divided by `penalty` when positive, else multiplied.

    Source: Keskar et al., "CTRL" (2019), as transformers applies it: to every token of prompt and completion, once.
    """
    result: NDArray[np.float32] = logits.copy()
    chosen = logits[seen]
    with np.errstate(over="ignore"):
        result[seen] = np.where(chosen > 0, chosen / np.float32(penalty), chosen * np.float32(penalty))
    return result


def distribution(
    logits: NDArray[np.float32], temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens that may be drawn, ascending, and their probabilities f64, which sum to 1. `temperature` > 0.

    `top_k` keeps the k largest and what equals the smallest of them. `top_p` keeps the most likely tokens until they
    hold that much of the probability, at least one. `min_p` keeps what has at least that share of the largest.
    """
    peak = logits.max()
    if not np.isfinite(peak):
        raise ModelError("the logits are not finite: the model's arithmetic overflowed on this prompt")
    with np.errstate(over="ignore"):
        scores = (logits.astype(np.float64) - float(peak)) / temperature
    tokens = np.arange(len(scores))
    if top_k is not None and top_k < len(scores):
        tokens = np.flatnonzero(scores >= np.partition(scores, -top_k)[-top_k])
    shares = np.exp(scores[tokens])
    shares /= shares.sum()
    if top_p is not None and top_p < 1.0:
        # Tokens this unlikely cannot together reach what is to be cut, so the sort can leave them out.
        likely = shares >= min((1.0 - top_p) / len(shares), shares.max())
        cut = 1.0 - top_p - shares[~likely].sum()
        tokens, shares = tokens[likely], shares[likely]
        order = np.argsort(-shares, kind="stable")[::-1]  # ascending; of equals, the first token is the last to go
        keep = np.ones(len(order), bool)
        keep[order[:-1]] = np.cumsum(shares[order])[:-1] > cut
        tokens, shares = tokens[keep], shares[keep]
    if min_p is not None:
        keep = shares >= min_p * shares.max()
        tokens, shares = tokens[keep], shares[keep]
    return tokens, shares / shares.sum()


def draw(tokens: NDArray[np.intp], probabilities: NDArray[np.float64], uniform: float) -> int:
    """The token at which the cumulated probabilities pass `uniform`."""
    cumulated = np.cumsum(probabilities)
    place = int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))
    return int(tokens[min(place, int(np.flatnonzero(probabilities)[-1]))])


def sampling_row(options: GenerationOptions, seed: int, sequence: int, position: int) -> tuple[int, ...]:
    """How a device is to draw the token at `position`, as eight int32; the same draw as `next_token`'s.

    (temperature as the bits of a float32, 0.0 being greedy; top_k, 0 being off; top_p, bits, 1.0 being off; min_p,
    bits, 0.0 being off; the seed's low and high words; the sequence's key; the position). No repetition penalty.
    """
    # What is above 0 stays above 0: float32 has fewer small numbers.
    temperature = 0.0 if options.greedy else min(max(options.temperature, _TINY), _HUGE)
    top_p = 1.0 if options.top_p is None else max(options.top_p, _TINY)
    numbers = np.array([temperature, top_p, options.min_p or 0.0], np.float32).view(np.int32).tolist()
    seeds = np.array([seed & _MASK, seed >> 32, sequence & _MASK], np.uint32).view(np.int32).tolist()
    top_k = min(options.top_k or 0, (1 << 31) - 1)
    return (numbers[0], top_k, *numbers[1:], *seeds, position)


def next_token(
    logits: NDArray[np.float32],
    greedy: int,
    options: GenerationOptions,
    seen: NDArray[np.intp] | None,
    seed: int,
    sequence: int,
    position: int,
) -> int:
    """The token that follows a row of logits f32[vocab], whose first maximum is `greedy`.

    `seen` are the token ids that the penalty applies to, each once; it may be None when the penalty is 1.
    """
    if options.plain:
        return greedy
    if options.repetition_penalty != 1.0 and seen is not None:
        logits = penalize(logits, seen, options.repetition_penalty)
    if options.greedy:
        return int(logits.argmax())
    tokens, probabilities = distribution(logits, options.temperature, options.top_k, options.top_p, options.min_p)
    return draw(tokens, probabilities, uniform(seed, sequence, position))
