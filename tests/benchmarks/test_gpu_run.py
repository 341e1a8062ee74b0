"""Benchmarks for GPUs without a GPU: rows chosen, measured on a fake, resumed, reported; workers that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.measure import measure
from benchmarks.gpu.report import write_report
from benchmarks.gpu.results import Results
from benchmarks.gpu.rows import Row, all_rows, select, setups
from benchmarks.gpu.supervise import supervise
from benchmarks.gpu.timing import take_turns
from benchmarks.gpu.worker import UNUSABLE, work
from tests.benchmarks.gpu_fakes import CEILINGS, MACHINE, FakeClock, FakeLab, FakeSteps
from tests.fixtures import REPOSITORY

PLAIN, OTHER = "8b-bf16-bf16-b1-1k", "8b-bf16-bf16-b1-8k"
BESIDE, PREFILL, SMALL = "8b-int8-bf16-b1-1k-vs-compile", "8b-int4-bf16-prefill-2k", "1b-int4-fp8-b1-1k"
FIRST = "8b-int4-bf16-first-token"


def chosen(*names: str) -> list[Row]:
    return select(all_rows(), ",".join(names))


def far() -> float:
    return time.monotonic() + 1000


def test_rows() -> None:
    rows = all_rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert {PLAIN, OTHER, BESIDE, PREFILL, SMALL, FIRST, "8b-bf16-bf16-b1-1k-vs-eager"} <= set(names)
    assert sum(row.kind == "decode" and row.setup.model == "8b" and row.peer is None for row in rows) == 36
    assert len(setups(rows)) == 12 and all(setup.config.exists() for setup in setups(rows))
    assert all(setup.name.isidentifier() for setup in setups(rows))
    assert [r.name for r in select(rows, "*-vs-*")] == [n for n in names if "-vs-" in n]
    assert select(rows, None) == rows
    with pytest.raises(ValueError, match="no row has such a name"):
        select(rows, f"{PLAIN},9b-*")


def test_systems_take_turns() -> None:
    clock, log = FakeClock(), list[str]()
    systems = {n: FakeSteps(clock, s, log, n) for n, s in (("a", 1e-3), ("b", 30e-3))}
    found = take_turns(clock, systems, seconds=0.5)
    assert found["a"] == pytest.approx([1e-3] * 10) and found["b"] == pytest.approx([30e-3] * 10)
    assert log[4:12] == ["a", "b", "b", "a", "a", "b", "b", "a"]  # after two to warm up for each


def test_a_row_beside_a_peer() -> None:
    lab = FakeLab()
    found = measure(chosen(BESIDE)[0], lab, {**MACHINE, **CEILINGS})
    assert lab.log.index("peer") < lab.log.index(BESIDE) < lab.log.index("check") < lab.log.index("ours")
    assert found["milliseconds"]["median"] == pytest.approx(8.0)
    assert found["bound_milliseconds"] == pytest.approx(4.0) and found["share"] == pytest.approx(0.5)
    assert found["bound_by"] == "memory" and not found["fits_cache"]
    assert found["peer"]["milliseconds"]["median"] == pytest.approx(12.0)
    assert found["peer"]["ratio"]["median"] == pytest.approx(1.5)
    assert found["peer"]["share"] == pytest.approx(1 / 3)
    assert found["tokens_per_second"] == pytest.approx(125.0)
    json.dumps(found, allow_nan=False)


def test_prefill_is_held_against_the_matrix_rate() -> None:
    found = measure(chosen(PREFILL)[0], FakeLab(), {**MACHINE, **CEILINGS})
    assert found["bound_by"] == "arithmetic"
    assert found["share"] == found["matrix_share"] == pytest.approx(found["flops"] / 8e-3 / 800e12)


def test_a_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    rows, messages = chosen(PLAIN, OTHER, SMALL), list[str]()
    broken = FakeLab({OTHER: RuntimeError("no luck")})
    assert work(rows, Results(tmp_path), broken, far(), messages.append) == 0
    results = Results(tmp_path)
    assert results.machine["copy_bandwidth"] == 4e12
    assert results.rows[OTHER]["error"] == "RuntimeError: no luck"
    assert results.rows[SMALL]["fits_cache"] and not results.rows[PLAIN]["fits_cache"]
    assert [row.name for row in results.missing(rows)] == [OTHER]
    assert [json.loads(m).get("row") for m in messages[::2]] == ["", PLAIN, OTHER, SMALL]
    again = FakeLab()
    work(results.missing(rows), results, again, far(), messages.append)
    assert "ceilings" not in again.log and PLAIN not in again.log
    assert not Results(tmp_path).missing(rows)


def test_a_failed_kernel_ends_the_worker(tmp_path: Path) -> None:
    lab = FakeLab({PLAIN: RuntimeError("CUDA error: an illegal memory access was encountered")})
    assert work(chosen(PLAIN, OTHER), Results(tmp_path), lab, far(), lambda text: None) == UNUSABLE
    assert OTHER not in Results(tmp_path).rows


def test_rows_without_time_are_not_begun(tmp_path: Path) -> None:
    messages: list[str] = []
    rows = chosen(PLAIN, BESIDE)
    work(rows, Results(tmp_path), FakeLab(), time.monotonic() + 20, messages.append)
    assert [row.name for row in Results(tmp_path).missing(rows)] == [BESIDE]
    assert json.loads(messages[-1])["skipped"] == BESIDE


def test_results_of_two_gpus_are_kept_apart(tmp_path: Path) -> None:
    Results(tmp_path).put_machine({**MACHINE, **CEILINGS, "gpu": "NVIDIA H100"})
    with pytest.raises(ValueError, match="rows of NVIDIA H100, and this is NVIDIA H200"):
        work(chosen(PLAIN), Results(tmp_path), FakeLab(), far(), lambda text: None)


def worker(script: str, out: Path, rows: Sequence[Row]) -> list[str]:
    names = [row.name for row in rows]
    program = f"import json, sys, time\nnames = {names!r}\ndef tell(**m): print(json.dumps(m), flush=True)\n{script}"
    return [sys.executable, "-c", program, str(out)]


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    said: list[str] = []
    script = """
for name in names:
    tell(row=name, budget=60)
    if name.endswith('b1-1k'): sys.exit(9)
    print('a library speaks')
    tell(done=name, result='fine')
"""
    rows = chosen(PLAIN, OTHER)
    supervise(rows, tmp_path, far(), lambda left: worker(script, tmp_path, left), said.append)
    assert Results(tmp_path).rows[PLAIN]["error"] == "the worker ended with status 9"
    assert said[1:] == [f"{PLAIN}: the worker ended with status 9", f"{OTHER}: fine"]


def test_a_worker_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.supervise.GRACE", 0.2)
    script = f"""
for name in names:
    tell(row=name, budget=0.1 if name == {PLAIN!r} else 60)
    if name == {PLAIN!r}: time.sleep(60)
    tell(done=name, result='fine')
"""
    start = time.monotonic()
    rows = chosen(PLAIN, OTHER)
    said: list[str] = []
    supervise(rows, tmp_path, far(), lambda left: worker(script, tmp_path, left), said.append)
    assert time.monotonic() - start < 30
    assert "took too long" in Results(tmp_path).rows[PLAIN]["error"]
    assert said[-1] == f"{OTHER}: fine"


def test_a_worker_that_cannot_start_is_not_tried_again(tmp_path: Path) -> None:
    said: list[str] = []
    supervise(chosen(PLAIN), tmp_path, far(), lambda left: worker("sys.exit(1)", tmp_path, left), said.append)
    assert said[1:] == ["the worker ended with status 1", "1 rows were not begun; the same command goes on with them"]


def test_reports(tmp_path: Path) -> None:
    rows = chosen(PLAIN, BESIDE, PREFILL, SMALL, FIRST, OTHER)
    broken = FakeLab({OTHER: RuntimeError("no luck")})
    work(rows, Results(tmp_path / "out"), broken, far(), lambda text: None)
    said: list[str] = []
    write_report(tmp_path / "out", tmp_path / "results", said.append)
    text = (tmp_path / "out/report.md").read_text()
    assert said[0] == text
    assert f"| {PLAIN} | 8.000 | 8.000 – 8.000 | 125 | 16.00 | 4.000 | 50% | 165 | 17.0 |  |  |" in text
    assert "12.000 (torch.compile, 33%) | 1.50 × (1.50 – 1.50) |" in text
    assert f"| {SMALL} † |" in text and f"| {PREFILL} ‡ |" in text
    assert f"- {OTHER}: RuntimeError: no luck" in text
    assert "NVIDIA H200, driver 580.1, SM 345 MHz of 1980 MHz at first; python 3.12.3, torch 2.11.0" in text
    (stored,) = (tmp_path / "results").glob("*-nvidia-h200.json")
    document = json.loads(stored.read_text())
    assert stored.name.startswith(document["date"]) and document["rows"][PLAIN]["share"] == pytest.approx(0.5)
    picture = ElementTree.fromstring(stored.with_suffix(".svg").read_text())
    texts = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert "8b-int8-bf16-b1-1k" in texts and "33%, 12.00 ms (torch.compile)" in texts


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` with its worker in this process, on the fake."""

    def in_process(rows: Sequence[Row], out: Path, deadline: float, command: Any, say: Any) -> None:
        arguments = command(Results(out).missing(rows))
        assert arguments[1:5] == ["-m", "benchmarks.gpu", "work", str(tmp_path)]
        names, seconds = (arguments[arguments.index(key) + 1] for key in ("--rows", "--seconds"))
        assert 500 < float(seconds) <= 540
        work(select(all_rows(), names), Results(out), FakeLab(), deadline, lambda text: None)

    monkeypatch.setattr("benchmarks.gpu.__main__.supervise", in_process)
    out = tmp_path / "out"
    assert main(["run", str(tmp_path), "--out", str(out), "--rows", "8b-int4-*,1b-*"]) == 0
    assert len(Results(out).rows) == len(chosen("8b-int4-*", "1b-*"))
    assert "100 %" in (out / "shares.svg").read_text()


def test_a_run_needs_no_compiler() -> None:
    program = (
        "import sys, benchmarks.gpu.__main__, benchmarks.gpu.lab\n"
        "print(*(m for m in sys.modules if m.startswith('llmc.') and not m.startswith('llmc.runtime')))\n"
        "print(*({'tvm', 'networkx', 'ml_dtypes', 'tokenizers', 'typer', 'rich'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stdout + done.stderr


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "has no results: run" in capsys.readouterr().err
    assert main(["predict", "--rows", "nothing"]) == 2
    assert main(["predict", "--rows", PLAIN]) == 0
    assert PLAIN in capsys.readouterr().out
