"""`--tune` on the CUDA driver: which GPUs it opens, and that what it measures with is given back."""

from __future__ import annotations

import pytest

from llmc import tuning
from llmc.backends.triton.compile import Compiled
from llmc.backends.triton.ops import BlockLinear
from llmc.backends.triton.plan import Bucket, GpuEntry, GpuLaunch
from llmc.backends.triton.products import product_kernel
from llmc.backends.triton.source import KernelSource
from llmc.backends.triton.tiling import Tunings
from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph
from llmc.ir.target import GPU_VARIANTS, GpuVariant, parse_target
from llmc.ir.types import DType
from llmc.passes.plan_memory import MemoryPlan
from llmc.tuning import Effort, tune
from llmc.tuning_devices import tuning_devices
from tests.runtime.cuda.fake import FakeCuda

SM_90 = GPU_VARIANTS["sm_90"]


def test_the_gpus_of_a_machine(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    with tuning_devices(parse_target("cuda:sm_80,sm_90", frozenset())) as found:
        assert found.keys() == {"sm_90"} and found["sm_90"].name.startswith("cuda:0")


def test_no_gpu(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "0")
    with (
        pytest.raises(LlmcError, match=r"architecture \(sm_90\), and there is none: no CUDA device"),
        tuning_devices(parse_target("cuda:sm_90", frozenset())),
    ):
        pass


def test_measuring(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's launches take 2 µs each, so that all candidates are equal; it fails for addresses that were
    not allocated, and for tickets that are not zero."""

    def pretend(
        sources: list[KernelSource], variant: GpuVariant, failures: dict[str, str] | None = None
    ) -> dict[str, Compiled]:
        count = {s.name: len(s.arguments) for s in sources}
        return {
            name: Compiled(
                b"\x7fELF" + f"9.0 timed_fn {n + 2}".encode(), b"", "timed_fn", 128, 0, n, True, 1, 0, 0, 1, None, 0.0
            )
            for name, n in count.items()
        }

    monkeypatch.setattr(tuning, "compile_sources", pretend)
    op = BlockLinear("q8", 256, 256, False, "none", False, None, DType.BF16, DType.F32)
    call, tiling = product_kernel(op, DType.BF16, DType.BF16, 4, 0, SM_90, Tunings(), epilogue="store")
    launch = GpuLaunch(call.spec(tiling), (), "", (0, 0, 0), (0, 0, 0), product=call)
    nothing = MemoryPlan({}, 0, 0)
    entry = GpuEntry(
        "decode", {}, Graph("g", (), (), (), ()), [launch], nothing, nothing, {"sm_90": (Bucket(4, (launch,)),)}
    )
    effort = Effort(most=2, rounds=3, replay=2e-5, cached=100_000)
    with tuning_devices(parse_target("cuda:sm_90", frozenset())) as found:
        result = tune([entry], [SM_90], found, effort)
    assert result.tunings.chosen == {(call.product, "sm_90"): tiling}
    (row,) = result.report["architectures"]["sm_90"]["products"]
    assert [c["microseconds"] for c in row["candidates"]] == pytest.approx([2.0, 2.0])
    replayed = cuda.launches("replayed")
    assert replayed and all(each.dependent for each in replayed[1:4])
    assert len({each.arguments[1] for each in replayed}) == 2  # copies of the weight
