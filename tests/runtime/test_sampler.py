"""Philox by its published answers; the distributions by chi-square and against transformers; greedy by definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.runtime.arguments import GenerationOptions
from llmc.runtime.errors import ModelError
from llmc.runtime.sampler import distribution, draw, next_token, penalize, philox, sampling_row, uniform

# Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[Any, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    a, b, c, d = words(counter)
    assert philox((a, b, c, d), (words(key)[0], words(key)[1])) == words(expected)


def test_philox_on_arrays_is_philox_on_integers() -> None:
    positions = np.arange(100, dtype=np.uint64)
    zeros = np.zeros(100, np.uint64)
    many = philox((positions, zeros + 7, zeros, zeros), (zeros + 0xDEADBEEF, zeros + 0x12345678))
    one = [philox((i, 7, 0, 0), (0xDEADBEEF, 0x12345678)) for i in range(100)]
    assert np.stack(many, axis=1).tolist() == [list(row) for row in one]


def test_draws_differ_in_seed_sequence_and_position() -> None:
    draws = {uniform(s, q, p) for s in (0, 1, 1 << 32, (1 << 64) - 1) for q in range(8) for p in range(64)}
    assert len(draws) == 4 * 8 * 64
    assert all(0 < u < 1 for u in draws)


def chi_square(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """The statistic over tokens that may be drawn; what may not be drawn must not have been."""
    allowed = probabilities > 0
    assert observed[~allowed].sum() == 0
    expected = probabilities[allowed] * observed.sum()
    return float(((observed[allowed] - expected) ** 2 / expected).sum())


SETTINGS: list[tuple[float, int | None, float | None, float | None]] = [
    (1.0, None, None, None),
    (0.7, 5, None, None),
    (1.3, None, 0.8, None),
    (1.0, None, None, 0.1),
    (1.5, 8, 0.9, 0.05),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_draws_follow_the_distribution(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    logits = np.random.default_rng(3).normal(size=12).astype(np.float32) * 2
    tokens, probabilities = distribution(logits, temperature, top_k, top_p, min_p)
    expected = np.zeros(12)
    expected[tokens] = probabilities
    counts = np.bincount([draw(tokens, probabilities, uniform(5, 0, p)) for p in range(20_000)], minlength=12)
    # 99.9 % quantile of chi-square with 11 degrees of freedom, which is above those with fewer
    assert chi_square(counts, expected) < 31.3


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.floats(0.05, 5.0),
    st.none() | st.integers(1, 50),
    st.none() | st.floats(0.01, 1.0),
    st.none() | st.floats(0.0, 1.0),
)
def test_the_distribution_is_that_of_transformers(
    values: list[float], temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Same tokens kept (but where a float64 and its twin stand on either side of a bound), same probabilities."""
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers").generation.logits_process
    scores = torch.tensor([values], dtype=torch.float64) / temperature
    if top_k is not None:
        scores = warpers.TopKLogitsWarper(top_k)(None, scores)
    margin = None
    if top_p is not None and top_p < 1.0:
        shares = torch.sort(torch.softmax(scores, -1)).values.cumsum(-1)
        margin = (shares - (1 - top_p)).abs().min().item()
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
    if min_p is not None and min_p < 1.0:
        shares = torch.softmax(scores, -1)
        near = (shares - min_p * shares.max()).abs().min().item()
        margin = near if margin is None else min(margin, near)
        scores = warpers.MinPLogitsWarper(min_p)(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    logits = np.array(values, np.float32)
    tokens, probabilities = distribution(logits, temperature, top_k, top_p, None if min_p == 1.0 else min_p)
    if len(set(values)) == len(values) and (margin is None or margin > 1e-9):
        found = np.zeros(len(values))
        found[tokens] = probabilities
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-300)
    assert len(tokens) >= 1 and abs(probabilities.sum() - 1) < 1e-12
    assert int(logits.argmax()) in tokens


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=30),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.floats(0.1, 10),
)
def test_the_penalty_is_that_of_transformers(values: list[float], ids: list[int], penalty: float) -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers").generation.logits_process
    expected = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), torch.tensor([values]))
    found = penalize(np.array(values, np.float32), np.array(sorted(set(ids)), np.intp), penalty)
    np.testing.assert_array_equal(found, expected[0].numpy())


def options(**changes: Any) -> GenerationOptions:
    standard: dict[str, Any] = {
        "max_new_tokens": 1, "temperature": 0.0, "top_k": None, "top_p": None, "min_p": None,
        "repetition_penalty": 1.0, "seed": 0, "stop_strings": (), "stop_token_ids": frozenset(), "ignore_eos": False,
    }  # fmt: skip
    return GenerationOptions(**{**standard, **changes})


def test_temperature_zero_is_the_first_maximum() -> None:
    logits = np.array([1, 3, 2, 3], np.float32)
    assert next_token(logits, 1, options(), None, 0, 0, 0) == 1
    assert next_token(logits, 1, options(top_k=2, top_p=0.5), None, 0, 0, 0) == 1
    seen = np.array([1], np.intp)
    assert next_token(logits, 1, options(repetition_penalty=2.0), seen, 0, 0, 0) == 3


def test_extreme_temperatures() -> None:
    logits = np.array([0.0, 1.0, 1.0 - 1e-3], np.float32)
    assert distribution(logits, 1e-300, None, None, None)[1].tolist() == [0, 1, 0]
    tokens, probabilities = distribution(logits, 1e300, None, None, None)
    np.testing.assert_allclose(probabilities, 1 / 3)
    assert draw(tokens, probabilities, 1 - 2**-33) == 2
    assert draw(*distribution(logits, 1e-300, None, None, None), 1 - 2**-33) == 1


@pytest.mark.parametrize("top_p", [1e-300, 1e-12, 0.5, 1.0])
def test_a_flat_row_keeps_at_least_one(top_p: float) -> None:
    tokens, probabilities = distribution(np.zeros(1024, np.float32), 1.0, None, top_p, None)
    assert len(tokens) == max(1, int(1024 * top_p))  # shares of 2^-10 are exact
    assert abs(probabilities.sum() - 1) < 1e-12


def test_ties_at_the_top_k_bound_stay() -> None:
    assert distribution(np.array([1, 2, 2, 0], np.float32), 1.0, 1, None, None)[0].tolist() == [1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    with pytest.raises(ModelError, match="not finite"):
        distribution(np.array([0, bad, 1], np.float32), 1.0, None, None, None)


def test_masked_logits_are_never_drawn() -> None:
    tokens, probabilities = distribution(np.array([-np.inf, 0, -np.inf, 0], np.float32), 1.0, None, None, None)
    assert {draw(tokens, probabilities, uniform(1, 0, p)) for p in range(200)} == {1, 3}


def as_float(word: int) -> float:
    return float(np.array([word], np.int32).view(np.float32)[0])


def test_a_row_for_a_device_that_samples() -> None:
    row = sampling_row(options(temperature=0.5, top_k=7, top_p=0.25, min_p=0.125), (3 << 32) + 0xFFFFFFFF, 9, 41)
    assert [as_float(row[i]) for i in (0, 2, 3)] == [0.5, 0.25, 0.125]
    assert (row[1], *row[4:]) == (7, -1, 3, 9, 41)
    assert np.array([row], np.int32).shape == (1, 8)


def test_what_a_row_says_of_options_that_are_off_or_extreme() -> None:
    row = sampling_row(options(temperature=1.0), 0, 0, 0)
    assert [as_float(row[i]) for i in (0, 2, 3)] == [1.0, 1.0, 0.0] and row[1] == 0
    assert sampling_row(options(temperature=0.0, top_p=0.5), 0, 0, 0)[0] == 0, "greedy"
    tiny = sampling_row(options(temperature=1e-300, top_p=1e-300, top_k=1 << 40), 0, 0, 0)
    assert as_float(tiny[0]) > 0 and as_float(tiny[2]) > 0 and tiny[1] == (1 << 31) - 1, "not greedy, not off"
    assert np.isfinite(as_float(sampling_row(options(temperature=1e300), 0, 0, 0)[0]))
