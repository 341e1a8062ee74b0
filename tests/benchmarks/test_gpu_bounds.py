"""The arithmetic of bounds and predictions, against figures worked out elsewhere."""

from __future__ import annotations

import pytest

from benchmarks.gpu.bounds import Shape, bound, plan_bytes, row_bytes, row_flops
from benchmarks.gpu.predict import CEILINGS, predict, print_predictions
from benchmarks.gpu.rows import Row, Setup, all_rows
from tests.fixtures import REPOSITORY

EIGHT = Shape.read(REPOSITORY / "benchmarks/configs/llama-3.1-8b.json")


def row(weights: str, cache: str, batch: int, context: int, model: str = "8b") -> Row:
    return Row("decode", Setup(model, weights, cache), batch, context)


def milliseconds(of: Row) -> float:
    shape = Shape.read(of.setup.config)
    return 1e3 * bound(row_bytes(of, shape), row_flops(of, shape), CEILINGS)


@pytest.mark.parametrize(
    ("weights", "cache", "batch", "context", "expected"),
    [  # of a roofline written before this one, which counts activations too: up to 0.02 ms, at batch 64 0.1
        ("bf16", "bf16", 1, 1024, 3.52),
        ("bf16", "bf16", 1, 8192, 3.74),
        ("bf16", "bf16", 8, 1024, 3.76),
        ("bf16", "bf16", 8, 8192, 5.50),
        ("bf16", "bf16", 64, 1024, 5.62),
        ("bf16", "bf16", 64, 8192, 19.6),
        ("bf16", "fp8", 8, 8192, 4.51),
        ("int4", "fp8", 1, 1024, 0.98),
        ("int4", "fp8", 8, 8192, 1.97),
    ],
)
def test_bounds_of_8b(weights: str, cache: str, batch: int, context: int, expected: float) -> None:
    assert milliseconds(row(weights, cache, batch, context)) == pytest.approx(expected, abs=0.02 + 0.002 * batch)


def test_parameters_are_those_of_the_models() -> None:
    assert EIGHT.layer_weights == 6_979_321_856
    assert EIGHT.layer_weights + EIGHT.head_weights == 7_504_658_432  # 7.505 G streamed for a token
    one = Shape.read(REPOSITORY / "benchmarks/configs/llama-3.2-1b.json")
    norms = (2 * one.layers + 1) * one.hidden
    assert one.tied and one.layer_weights + one.head_weights + norms == 1_235_814_400


def test_int8_has_a_scale_for_each_group() -> None:
    assert EIGHT.weight_bytes("int8") == pytest.approx(7_504_658_432 * (1 + 2 / 128))
    assert EIGHT.weight_bytes("int4") < EIGHT.weight_bytes("int8") < EIGHT.weight_bytes("bf16")


def test_prefill_is_bound_by_arithmetic() -> None:
    prefill = Row("prefill", Setup("8b", "bf16", "bf16"), 1, 2048)
    operations = 2 * 2048 * EIGHT.layer_weights
    attention = 4 * 32 * 128 * 32 * 2048 * 2049 / 2
    assert row_flops(prefill, EIGHT) == operations + attention + 2 * EIGHT.head_weights
    assert milliseconds(prefill) == pytest.approx(1e3 * row_flops(prefill, EIGHT) / 788e12)


def test_bytes_of_a_plan() -> None:
    launches = [{"bytes": [100, 10, 0]}, {"bytes": [0, 0, 2]}]
    assert plan_bytes(launches, tokens=4, context=1000) == 100 + 40 + 2000
    launches.append({"bytes": [0, 0, 1], "window": 30})  # type: ignore[dict-item]
    assert plan_bytes(launches, tokens=4, context=1000, sequences=4) == 100 + 40 + 2000 + 120


def test_predictions() -> None:
    found = predict(row("bf16", "bf16", 1, 1024))
    assert found is not None
    kernels = 165
    assert found.expected == pytest.approx(found.bound + kernels * 0.8e-6)
    assert found.bound < found.expected < found.worst
    lines: list[str] = []
    print_predictions(all_rows(), lines.append)
    assert lines[2].startswith("| 8b-bf16-bf16-b1-1k | 15.14 | 3.52 | 3.65 | 96% |")
    assert not any("first-token" in line or "-vs-" in line for line in lines)
