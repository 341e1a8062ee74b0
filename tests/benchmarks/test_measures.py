"""What is made of measured rounds, and the shapes of the peers' models."""

from __future__ import annotations

import json

import pytest

from benchmarks.measures import Measure, Run, Spread, parse_measures, summarize
from benchmarks.peers.shapes import parameters, tensors
from tests.fixtures import fixture_path


def test_measures_are_read() -> None:
    assert parse_measures("prefill, decode@512,batch8@32", 100, 64) == [
        Measure("prefill", "prefill", 100),
        Measure("decode@512", "decode", 64, 512),
        Measure("batch8@32", "decode", 64, 32, 8),
    ]


@pytest.mark.parametrize("text", ["decode", "decode@x", "batch0@1", "batch@1", ""])
def test_other_measures_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="measure"):
        parse_measures(text, 100, 64)


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(2.0, 3.0, 4.0)


def test_ratios_are_of_pairs_within_a_round() -> None:
    """The machine slows down by four between rounds; the ratio of every pair is two."""
    measure = Measure("decode@0", "decode", 10)
    runs = [
        Run(round, "decode@0", system, seconds * slower, 50e9 / slower, 0.0, 0.0)
        for round, slower in enumerate((1.0, 4.0, 2.0))
        for system, seconds in (("ours", 1.0), ("theirs", 2.0))
    ]
    facts = {"step_bytes": (30e9, 0, 0)}
    theirs = summarize(measure, "theirs", runs, facts, "ours")
    assert theirs is not None
    assert theirs["ratio"] == {"low": 2.0, "median": 2.0, "high": 2.0}
    assert theirs["tokens_per_second"] == 10 / 4.0
    ours = summarize(measure, "ours", runs, facts, "ours")
    assert ours is not None and ours["ratio"] is None
    assert ours["share"] == pytest.approx(30e9 * 10 / 1.0 / 50e9)
    assert summarize(measure, "nobody", runs, facts, "ours") is None


@pytest.mark.parametrize("name", ["llama-3.2-1b", "smollm-135m"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = json.loads(fixture_path(f"configs/{name}.json").read_text())
    expected = json.loads(fixture_path("configs/expected_params.json").read_text())["configs"][name]["params"]
    assert parameters(config) == expected
    assert len(dict(tensors(config))) == len(tensors(config))
