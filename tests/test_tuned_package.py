"""A package compiled with `--tune`: it differs from one without only in the kernels that were cut otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc import tuning, tuning_devices
from llmc.backends.triton.source import KernelSource
from llmc.compile_report import CompileReport
from llmc.report.ledger import print_compile_report
from tests import tiny_models
from tests.backends.triton.interpreted_package import compile_interpreted, load_interpreted
from tests.fixtures import REPOSITORY
from tests.tuning_gpu import FakeCompiler, FakeGpu, constant

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 500}
PRODUCTS = "linear_"
CHANGED = {"kernels-sm_90.json", "kernels-sm_90.zip", "manifest.json", "plan-sm_90.json"}


def few_loads(source: KernelSource) -> float:
    """Seconds of a GPU that likes few loads in flight, which the model does not."""
    return 1e-5 * float(constant(source, "STAGES"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_models.make_model("llama", **SIZES, num_key_value_heads=2)
    return tiny_models.save(made, tmp_path_factory.mktemp("tuned") / "model")


def compile_tuned(monkeypatch: pytest.MonkeyPatch, model: Path, output: Path) -> dict[str, KernelSource]:
    compiler = FakeCompiler()
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "compile_sources", compiler)
        patch.setattr(tuning_devices, "open_gpus", lambda: iter([FakeGpu(few_loads, sources=compiler.sources)]))
        return compile_interpreted(monkeypatch, model, output, tune=True)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_bytes())


def launches(folder: Path) -> list[tuple[str, list[int], str, list[Any]]]:
    """Of every launch its kernel, grid, node and buffers."""
    plan = read(folder, "plan-sm_90.json")
    buckets = [bucket for entry in plan["entries"].values() for bucket in entry["buckets"]]
    return [
        (plan["kernels"][each["kernel"]], each["grid"], each["node"], [plan["buffers"][i] for i in each["args"]])
        for bucket in buckets
        for each in bucket["launches"]
    ]


def test_a_tuned_package(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tuned, again = (tmp_path / name / "model" for name in ("plain", "tuned", "again"))
    sources = {plain: compile_interpreted(monkeypatch, model, plain), tuned: compile_tuned(monkeypatch, model, tuned)}
    compile_tuned(monkeypatch, model, again)
    files = {
        f: {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (plain, tuned, again)
    }
    assert files[tuned] == files[again]  # whatever the times were, the package has none of them
    assert files[plain].keys() == files[tuned].keys()
    assert {name for name, data in files[plain].items() if data != files[tuned][name]} == CHANGED
    manifests = [read(folder, "manifest.json") for folder in (plain, tuned)]
    assert [m["target"].pop("tuned") for m in manifests] == [[], ["sm_90"]]
    for manifest in manifests:
        for what in (manifest["files"], manifest["sizes"]):
            for name in CHANGED | {"kernels"}:
                what.pop(name, None)
    assert manifests[0] == manifests[1]
    changed = 0
    for one, other in zip(launches(plain), launches(tuned), strict=True):
        assert one[2:] == other[2:]
        if one[0] == other[0]:
            assert one[1] == other[1]
            continue
        changed += 1
        assert one[0].startswith(PRODUCTS) and other[0].startswith(PRODUCTS)
        mine = sources[tuned][other[0]]
        assert constant(mine, "STAGES") < constant(sources[plain][one[0]], "STAGES")
        assert other[1] == [constant(mine, "PROGRAMS"), 1, 1]
    assert changed
    logits = [load_interpreted(folder, sources[folder])[0].logits([5, 70, 33, 1]) for folder in (plain, tuned)]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits[0]).max()


def test_the_report(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_tuned(monkeypatch, model, tmp_path / "package")
    written = read(tmp_path / "package.report", "compile.json")
    table = written["tuning"]["architectures"]["sm_90"]
    assert table["device"] == "cuda:0 (fake (9, 0))" and "tuning" in written["seconds"]
    for row in table["products"]:
        chosen = row["candidates"][row["chosen"]]
        assert chosen["stages"] == min(c["stages"] for c in row["candidates"])
        assert chosen["microseconds"] == pytest.approx(10 * chosen["stages"])
        assert 0 < chosen["bandwidth"] < 1 and chosen["modelled"] > 0
    report = CompileReport(tmp_path / "package", tuning=written["tuning"], seconds={"tuning": 1.5})
    report.sizes = dict.fromkeys(("weights", "kernels", "kv_bytes_per_token", "kv_bytes_of_windows"), 1)
    report.memory = {"decode": {"peak": 1, "naive": 1}}
    print_compile_report(report)
    count = len(table["products"])
    changed = sum(row["chosen"] != 0 for row in table["products"])
    assert f"sm_90: {count} of {count} products measured, {changed} not as modelled" in capsys.readouterr().out


def test_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmc", "compile", str(REPOSITORY / "examples" / "picocode"), "--tune"]
    done = subprocess.run([*command, "-o", str(tmp_path / "p")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("llmc: --tune measures kernels for GPUs")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
