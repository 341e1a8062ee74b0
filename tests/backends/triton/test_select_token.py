"""Tokens chosen by the kernel against the host's sampler: equal, or within rounding of a bound of the host's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.kernels.select_token import select_token_grid, select_token_spec, select_token_workspace
from llmc.runtime.sampler import distribution, draw, uniform
from tests.backends.triton.interpreter import TARGET, run

NEAR = 1e-5
"""How near to a bound float32 may decide otherwise than float64."""


@dataclass(frozen=True)
class Sampling:
    """One row's options, as float32 holds them."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sequence: int = 0
    position: int = 0

    def words(self) -> np.ndarray:
        t, p, m = np.array([self.temperature, self.top_p, self.min_p], np.float32).view(np.uint32)
        high, low = self.seed >> 32, self.seed & 0xFFFFFFFF
        return np.array([t, self.top_k, p, m, low, high, self.sequence, self.position], np.uint32).view(np.int32)

    def host(self, logits: np.ndarray, number: float, top_p: float | None = None, min_p: float | None = None) -> int:
        """The host's token for a uniform number, at these bounds or other ones."""
        tokens, shares = distribution(
            logits,
            float(np.float32(self.temperature)),
            self.top_k or None,
            float(np.float32(self.top_p)) if top_p is None else top_p,
            float(np.float32(self.min_p)) if min_p is None else min_p,
        )
        return draw(tokens, shares, number)

    def expected(self, logits: np.ndarray) -> int:
        return self.host(logits, uniform(self.seed, self.sequence, self.position))

    def neighbours(self, logits: np.ndarray) -> set[int]:
        """The host's tokens when the number or a bound is moved by `NEAR`."""
        number = uniform(self.seed, self.sequence, self.position)
        found = set()
        for top_p in {min(1.0, max(1e-9, self.top_p + d)) for d in (-NEAR, 0.0, NEAR)}:
            for min_p in {max(0.0, self.min_p * (1 + d)) for d in (-NEAR, 0.0, NEAR)}:
                for d in (-NEAR, 0.0, NEAR):
                    found.add(self.host(logits, min(max(number + d, 0.0), 1.0), top_p, min_p))
        return found


def choose(logits: np.ndarray, rows: list[Sampling], block: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """greedy and chosen; a row of padding behind stays as it was, and the tickets are left zero."""
    count, vocab = logits.shape
    spec = select_token_spec(vocab=vocab, block=block)
    words, tickets = select_token_workspace(spec, count + 1)
    padding = np.full((1, vocab), np.nan, np.float32)
    greedy, chosen = (torch.full((count + 1,), -7, dtype=torch.int32) for _ in range(2))
    tensors = {
        "logits_ptr": torch.from_numpy(np.concatenate([logits, padding])),
        "sampling_ptr": torch.from_numpy(np.stack([*(r.words() for r in rows), np.full(8, -1, np.int32)])),
        "greedy_ptr": greedy,
        "chosen_ptr": chosen,
        "workspace_ptr": torch.full((words,), torch.nan),
        "tickets_ptr": torch.zeros(tickets, dtype=torch.int32),
        "dims_ptr": torch.tensor([0, 0, 0, count], dtype=torch.int32),
    }
    run(source_of(spec, TARGET), select_token_grid(spec, count + 1), tensors)
    assert greedy[count] == chosen[count] == -7
    assert not tensors["tickets_ptr"].any()
    return greedy[:count].numpy(), chosen[:count].numpy()


def check(logits: np.ndarray, rows: list[Sampling], block: int = 64) -> int:
    """All tokens as the host's, or near a bound; returns how many differ."""
    greedy, chosen = choose(logits, rows, block)
    np.testing.assert_array_equal(greedy, logits.argmax(-1))
    different = 0
    for x, row, token in zip(logits, rows, chosen, strict=True):
        if token != row.expected(x):
            different += 1
            assert token in row.neighbours(x), (row, token, row.expected(x))
    return different


@pytest.mark.parametrize(
    ("vocab", "block", "count"), [(1, 64, 10), (5, 64, 100), (64, 64, 100), (300, 64, 50), (1000, 128, 20)]
)
def test_plain_draws(vocab: int, block: int, count: int) -> None:
    random = np.random.default_rng(vocab)
    logits = (random.standard_normal((count, vocab)) * random.uniform(0, 8, (count, 1))).astype(np.float32)
    rows = [
        Sampling(float(random.uniform(0.05, 3)), seed=int(random.integers(1 << 63)) * 2 + 1, sequence=i, position=i * i)
        for i in range(count)
    ]
    assert check(logits, rows, block) <= 1


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("kind", ["top_k", "top_p", "min_p", "all"])
def test_truncated_draws(kind: str, coarse: bool) -> None:
    random = np.random.default_rng(3)
    count, vocab = 24, 300
    logits = (random.standard_normal((count, vocab)) * random.uniform(0.1, 6, (count, 1))).astype(np.float32)
    if coarse:  # many equals
        logits = np.round(logits)
    rows = [
        Sampling(
            float(random.uniform(0.3, 2)),
            top_k=int(random.choice([1, 2, 7, 12, 50, 299, 300, 5000])) if kind in ("top_k", "all") else 0,
            top_p=float(random.choice([1e-6, 0.3, 0.9, 0.99])) if kind in ("top_p", "all") else 1.0,
            min_p=float(random.choice([1e-3, 0.05, 0.5, 1.0])) if kind in ("min_p", "all") else 0.0,
            seed=i,
            sequence=0xFFFFFFFF - i,
            position=i,
        )
        for i in range(count)
    ]
    assert check(logits, rows) <= 1


@pytest.mark.parametrize(("top_p", "kept"), [(1e-6, 1), (0.25, 16), (0.5, 32), (0.99, 64)])
def test_of_equals_the_first_stay(top_p: float, kept: int) -> None:
    """Shares of 1/64 are exact: which tokens stay is certain."""
    rows = [Sampling(1.0, top_p=top_p, position=i) for i in range(12)]
    _, chosen = choose(np.zeros((12, 64), np.float32), rows, block=16)
    for row, token in zip(rows, chosen, strict=True):
        assert token == int(uniform(0, 0, row.position) * kept)


def test_temperature_zero_is_the_first_maximum() -> None:
    logits = np.zeros((5, 200), np.float32)
    logits[0, [130, 70]] = 3
    logits[1] = -0.0
    logits[1, 100] = 0.0  # no larger than what is before it
    logits[2, [0, 5, 199]] = np.nan, np.inf, np.inf
    logits[3] = np.nan
    logits[4] = -np.inf
    greedy, chosen = choose(logits, [Sampling(0.0, top_k=3, top_p=0.5)] * 5)
    assert greedy.tolist() == chosen.tolist() == [70, 0, 5, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
def test_what_the_host_refuses_is_minus_one(bad: float | None) -> None:
    logits = np.zeros((2, 100), np.float32)
    logits[0] = -np.inf
    if bad is not None:
        logits[0, 70] = bad
    _, chosen = choose(logits, [Sampling(1.0), Sampling(1.0, top_k=4)])
    assert chosen[0] == -1 and 0 <= chosen[1] < 100


def test_masked_tokens_and_extreme_temperatures() -> None:
    logits = np.full((24, 100), -np.inf, np.float32)
    logits[:, [3, 70, 99]] = 0.0, 1.0, 1.0 - 1e-3
    temperatures = (1e-30, 1.0, 1e30)
    rows = [
        Sampling(temperatures[i % 3], top_k=(0, 50)[i % 2], top_p=(1.0, 0.999)[i // 2 % 2], position=i)
        for i in range(24)
    ]
    assert check(logits, rows) == 0


def test_a_launch_of_one_program_a_row_and_one_of_several_agree() -> None:
    random = np.random.default_rng(9)
    logits = (random.standard_normal((8, 500)) * 3).astype(np.float32)
    rows = [Sampling(1.0, top_k=(0, 40)[i % 2], top_p=(1.0, 0.8)[i // 2 % 2], position=i) for i in range(8)]
    np.testing.assert_array_equal(choose(logits, rows, 512)[1], choose(logits, rows, 32)[1])
