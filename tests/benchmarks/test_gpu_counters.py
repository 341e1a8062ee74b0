"""ncu's counters beside the plan. Its files are written here as its documentation has them: no GPU has made one yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.counters import METRICS, OPTIONS, Planned, compare, planned_launches, read_counters
from benchmarks.gpu.rows import Row, Setup
from tests.benchmarks.test_gpu_package import compile_tiny, open_tiny

HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
PLANNED = [Planned("linear_a", "q", 1_000_000), Planned("norm_b", "n", 0), Planned("linear_a", "k", 3_000_000)]
SEEN = [
    ("linear_a", ("1,000", "900,000", "100,000", "50.0")),
    ("norm_b", ("500", "10,000", "0", "8")),
    ("linear_a", ("3,000.00", "3,000,000", "1,000,000", "70.0")),
]


def csv_of(*launches: tuple[str, tuple[str, ...]], metrics: tuple[str, ...] = METRICS) -> str:
    lines = ["==PROF== Connected to process 7", "8b-bf16", HEAD]
    for number, (name, values) in enumerate(launches):
        for metric, value in zip(metrics, values, strict=False):
            lines.append(
                f'"{number}","7","python3","host","{name}","1","7","(128, 1, 1)","(132, 1, 1)","0","9.0",'
                f'"Command line profiler metrics","{metric}","byte","{value}"'
            )
    return "\n".join([*lines, "==PROF== Disconnected from process 7"])


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "step.csv"
    path.write_text(csv_of(*SEEN))
    return path


def test_the_table(written: Path) -> None:
    rows = compare(PLANNED, read_counters(written)).splitlines()[2:]
    assert rows == [
        "| linear_a | 2 | 2.0 | 4.00 | 5.00 | 1.25 | 1.25 | 65 % |",
        "| norm_b | 1 | 0.5 | 0.00 | 0.01 |  | 0.02 | 8 % |",
        "| all 3 of 3 | 3 | 1.5 | 4.00 | 5.01 | 1.25 | 1.11 | 59 % |",
    ]


def test_the_first_launches_alone(written: Path) -> None:
    rows = compare(PLANNED, read_counters(written)[:1]).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| linear_a", "| all 1 of 3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==ERROR== The user does not have permission", "no output of 'ncu --csv': ==ERROR== The user"),
        ("", "no output of 'ncu --csv': no line begins"),
        (csv_of(("linear_a", ("n/a",))), f"launch 0 has no number for {METRICS[0]}"),
        (HEAD, "ncu saw 0 launches, and the step has 3"),
        (csv_of(*SEEN, SEEN[0]), "ncu saw 4 launches, and the step has 3"),
        (csv_of(SEEN[1]), "launch 0 is linear_a in the plan, and ncu saw norm_b"),
        (csv_of(("linear_a", ("1", "2"))), f"launch 0 lacks {METRICS[2]}, {METRICS[3]}: run ncu with {OPTIONS}"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "step.csv").write_text(text)
    with pytest.raises(ValueError) as caught:
        compare(PLANNED, read_counters(tmp_path / "step.csv"))
    assert message in str(caught.value)


def test_one_row_must_be_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["counters", str(tmp_path), "step.csv", "--rows", "8b-*-b1-1k"]) == 2
    assert "--rows must choose one row, given '8b-*-b1-1k', which chooses 6" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["counters", str(tmp_path), "step.csv", "--rows", "8b-bf16-bf16-b1-1k"]) == 2
    assert "m8b_bf16_bf16/manifest.json" in capsys.readouterr().err


def test_the_step_makes_the_plans_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a profiler sees is what the plan has: the same kernels in the same order, with the bytes of all."""
    setup = Setup("8b", "bf16", "bf16")
    sources = compile_tiny(monkeypatch, tmp_path / setup.name)
    package = open_tiny(monkeypatch, tmp_path / setup.name, sources)
    for row in (Row("decode", setup, batch=2, context=20), Row("prefill", setup, batch=1, context=24)):
        device, steps = package.device, package.steps(row)
        before = len(device.launched)  # type: ignore[attr-defined]
        steps.launch()
        launched = device.launched[before:]  # type: ignore[attr-defined]
        planned = planned_launches(tmp_path, row)
        kernels = {name: source.name for name, source in sources.items()}
        assert [plan.function for plan in planned] == [kernels.get(name, name) for name in launched]
        assert sum(plan.bytes for plan in planned) == package.facts(row)["plan_bytes"]
    package.close()
