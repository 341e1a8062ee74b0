"""`--tune` without a GPU: what it measures, what it chooses, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmc import driver, tuning, tuning_devices
from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.plan import GpuEntry, planned_products
from llmc.backends.triton.products import ProductCall
from llmc.backends.triton.source import KernelSource
from llmc.backends.triton.tiling import Tiling, Tunings, candidates
from llmc.driver import compile_model
from llmc.ir.errors import LlmcError
from llmc.ir.target import GPU_VARIANTS, parse_target
from llmc.options import CompileOptions
from llmc.runtime.cuda_api import CudaApi
from llmc.runtime.errors import ModelError
from llmc.tuning import Effort, Tuned, tune
from llmc.tuning_devices import Gpu
from tests import tiny_models
from tests.backends.triton.interpreted_package import compile_interpreted
from tests.tuning_gpu import FakeCompiler, FakeGpu, Times

SM_90 = GPU_VARIANTS["sm_90"]
BOTH = (GPU_VARIANTS["sm_80"], SM_90)
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192, "vocab_size": 500}
MOST = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_models.make_model("llama", **SIZES, num_key_value_heads=2)
    return tiny_models.save(made.bfloat16(), tmp_path_factory.mktemp("tuning") / "model")


@pytest.fixture(scope="module")
def entries(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[GpuEntry]:
    """The entries of a compile for two architectures, as they come to be tuned."""
    taken: list[Sequence[GpuEntry]] = []

    def take(entries: Sequence[GpuEntry], *rest: Any) -> Tuned:
        taken.append(entries)
        return Tuned(report={"architectures": {}})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning_devices, "open_gpus", lambda: iter([FakeGpu()]))
        patch.setattr(driver, "tune", take)
        output = tmp_path_factory.mktemp("tuning") / "package"
        compile_interpreted(patch, model, output, tune=True, target="cuda:sm_80,sm_90", checks=0)
    (found,) = taken
    return found


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    made = FakeCompiler()
    monkeypatch.setattr(tuning, "compile_sources", made)
    return made


def preference(source: KernelSource) -> float:
    """Seconds that have nothing to do with the model's."""
    return 1e-6 * (1 + int(source.name[-4:], 16) % 977)


def tuned(
    entries: Sequence[GpuEntry], compiler: FakeCompiler, times: Times = preference, **options: Any
) -> tuple[Tuned, FakeGpu]:
    gpu = FakeGpu(times, sources=compiler.sources)
    return tune(entries, [SM_90], {"sm_90": gpu}, Effort(most=MOST, rounds=2), **options), gpu


def tried(call: ProductCall) -> list[tuple[Tiling, KernelSource]]:
    return [(t, source_of(call.spec(t), SM_90)) for t in candidates(call.product, SM_90, MOST)]


def choices(result: Tuned, entries: Sequence[GpuEntry]) -> list[int | None]:
    """Of every product, the rank of what was chosen; None where nothing was."""
    found: list[int | None] = []
    for call in planned_products(entries, "sm_90"):
        tiling = result.tunings.get(call.product, SM_90)
        found.append(None if tiling is None else candidates(call.product, SM_90, MOST).index(tiling))
    return found


def test_the_products_of_a_plan(entries: Sequence[GpuEntry]) -> None:
    calls = planned_products(entries, "sm_90")
    assert len({call.product for call in calls}) == len(calls)
    assert {dict(call.options)["epilogue"] for call in calls} == {"append", "residual", "gated", "store"}
    assert {call.product.m for call in calls} == {1, 2, 4, 16, 32}
    planned = [launch for entry in entries for b in entry.buckets["sm_90"] for launch in b.launches]
    specs = {call.spec(candidates(call.product, SM_90)[0]) for call in calls}
    assert specs <= {launch.spec for launch in planned}


def test_the_fastest_is_chosen_and_the_report_says_why(entries: Sequence[GpuEntry], compiler: FakeCompiler) -> None:
    result, gpu = tuned(entries, compiler)
    calls = planned_products(entries, "sm_90")
    for call in calls:
        best = min(tried(call), key=lambda pair: preference(pair[1]))
        chosen = result.tunings.get(call.product, SM_90)
        assert chosen is not None
        assert preference(source_of(call.spec(chosen), SM_90)) <= preference(best[1]) * tuning.TIE
    assert len(set(choices(result, entries))) > 1
    assert compiler.calls == ["sm_90"]  # all at once
    assert result.architectures == ("sm_90",)
    table = result.report["architectures"]["sm_90"]
    assert table["device"] == gpu.name and len(table["products"]) == len(calls)
    for call, row in zip(calls, table["products"], strict=True):
        times = [preference(source) * 1e6 for _, source in tried(call)]
        assert [c["microseconds"] for c in row["candidates"]] == pytest.approx(times)
        weights = call.product.n * call.product.k * call.product.bits / 8
        assert row["candidates"][0]["bandwidth"] == pytest.approx(weights / (times[0] * 1e-6) / SM_90.bandwidth)
        assert row["by"] == "measurement" and row["product"]["m"] == call.product.m


def test_candidates_take_turns(entries: Sequence[GpuEntry], compiler: FakeCompiler) -> None:
    _, gpu = tuned(entries, compiler)
    first = [source.name for _, source in tried(planned_products(entries, "sm_90")[0])]
    assert gpu.measured[: 3 * MOST] == 3 * first  # to warm up, and twice


@pytest.mark.parametrize(("others", "expected"), [(1.0, 0), (0.985, 0), (0.97, 1)])
def test_of_equal_times_the_models_choice_stays(
    entries: Sequence[GpuEntry], compiler: FakeCompiler, others: float, expected: int
) -> None:
    first = {tried(call)[0][1].name for call in planned_products(entries, "sm_90")}
    result, _ = tuned(entries, compiler, lambda source: 1e-3 * (1 if source.name in first else others))
    assert set(choices(result, entries)) - {0} <= {expected}
    assert expected in choices(result, entries)


def test_what_the_budget_does_not_reach_is_left_to_the_model(
    entries: Sequence[GpuEntry], compiler: FakeCompiler
) -> None:
    seconds = itertools.count(0.0, 8.0)
    result, _ = tuned(entries, compiler, clock=lambda: next(seconds))
    found = choices(result, entries)
    measured = sum(rank is not None for rank in found)
    assert 0 < measured < len(found)
    assert all(rank is not None for rank in found[:measured])
    rows = result.report["architectures"]["sm_90"]["products"]
    assert [row["by"] for row in rows] == ["measurement"] * measured + ["model"] * (len(found) - measured)
    assert all("microseconds" not in c for c in rows[-1]["candidates"]) and rows[-1]["chosen"] == 0
    assert result.report["measured_seconds"] > result.report["budget_seconds"] == 60


def test_no_time_at_all(entries: Sequence[GpuEntry], compiler: FakeCompiler) -> None:
    seconds = itertools.count(0.0, 100.0)
    result, gpu = tuned(entries, compiler, clock=lambda: next(seconds))
    assert (result.tunings, result.architectures, gpu.measured) == (Tunings(), (), [])


def test_what_cannot_run_is_passed_over(entries: Sequence[GpuEntry], compiler: FakeCompiler) -> None:
    call = planned_products(entries, "sm_90")[0]
    names = [source.name for _, source in tried(call)]
    gpu = FakeGpu(sources=compiler.sources)
    compiler.broken, compiler.shared, gpu.refused = {names[0]}, {names[1]: 1 << 20}, {names[2]}
    result = tune(entries, [SM_90], {"sm_90": gpu}, Effort(most=MOST, rounds=1))
    assert result.tunings.get(call.product, SM_90) is None
    row = result.report["architectures"]["sm_90"]["products"][0]
    assert row["by"] == "model"
    assert [c["failure"] for c in row["candidates"]] == [
        "ptxas is not amused",
        f"{1 << 20} bytes of shared memory, of {SM_90.shared_bytes}",
        f"{gpu.name}: loading {names[2]}: no",
    ]
    compiler.shared, gpu = {}, FakeGpu(sources=compiler.sources)
    result = tune(entries, [SM_90], {"sm_90": gpu}, Effort(most=MOST, rounds=1))
    assert result.tunings.get(call.product, SM_90) == tried(call)[1][0]


def test_a_gpu_that_fails(entries: Sequence[GpuEntry], compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(sources=compiler.sources)

    def full(size: int) -> int:
        raise ModelError(f"cuda:0: {size} bytes of memory: out of memory")

    monkeypatch.setattr(gpu, "allocate", full)
    with pytest.raises(LlmcError, match=r"--tune: cuda:0: [0-9]+ bytes of memory: out of memory"):
        tune(entries, [SM_90], {"sm_90": gpu}, Effort(most=MOST))


def test_only_what_is_present_is_tuned(entries: Sequence[GpuEntry], compiler: FakeCompiler) -> None:
    gpu = FakeGpu(preference, sources=compiler.sources)
    result = tune(entries, BOTH, {"sm_90": gpu}, Effort(most=MOST, rounds=1))
    assert result.architectures == ("sm_90",) and {name for _, name in result.tunings.chosen} == {"sm_90"}
    other = result.report["architectures"]["sm_80"]
    assert other == {"device": None, "note": "no such GPU here: the model's choices", "products": []}


def opening(monkeypatch: pytest.MonkeyPatch, *gpus: FakeGpu) -> None:
    monkeypatch.setattr(tuning_devices, "open_gpus", lambda: iter(gpus))


def test_the_first_gpu_of_each_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [FakeGpu(capability=c) for c in ((8, 9), (9, 0), (9, 0), (8, 0))]
    opening(monkeypatch, *gpus)
    with tuning_devices.tuning_devices(parse_target("cuda:sm_80,sm_90,sm_100", frozenset())) as found:
        assert found == {"sm_90": gpus[1], "sm_80": gpus[3]}
    assert all(gpu.closed for gpu in gpus)


def test_no_gpu_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(capability=(8, 9))
    opening(monkeypatch, gpu)
    with pytest.raises(
        LlmcError, match=r"architecture \(sm_90\), and this machine has cuda:0 .* sm_89; without --tune"
    ):
        with_devices("cuda:sm_90")
    assert gpu.closed


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning_devices, "CudaApi", lambda: CudaApi("libcuda-of-nobody.so.1"))
    with pytest.raises(LlmcError) as caught:
        with_devices("cuda:sm_80,sm_90")
    text = str(caught.value)
    assert text.startswith(
        "--tune measures on a GPU of the target's architecture (sm_80, sm_90), and there is none: no"
    )
    assert "libcuda-of-nobody.so.1 cannot be loaded" in text and text.endswith("chooses, on any machine")


def test_gpus_are_closed_when_one_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()

    def broken() -> Iterator[Gpu]:
        yield gpu
        raise ModelError("cuda:1: a context: out of memory; and so on")

    monkeypatch.setattr(tuning_devices, "open_gpus", broken)
    with pytest.raises(LlmcError, match=r"there is none: cuda:1: a context: out of memory; without"):
        with_devices("cuda:sm_90")
    assert gpu.closed


def with_devices(target: str) -> None:
    with tuning_devices.tuning_devices(parse_target(target, frozenset())):
        raise AssertionError("devices were found")


def test_a_cpu_is_not_tuned(model: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"--tune measures kernels for GPUs, and the target is a CPU: leave --tune out"):
        compile_model(model, tmp_path / "p", CompileOptions(target="cpu:x86-64-v3", tune=True))
    assert not list(tmp_path.iterdir())
