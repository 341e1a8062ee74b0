"""The benchmarks' device: blocks of steps are started and not waited for, which the timing by events depends on."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.package import BenchDevice
from llmc.runtime.cuda_api import CudaApi
from llmc.runtime.cuda_driver import Copy
from tests.runtime.cuda.fake import FakeCuda


def test_replays_that_do_not_wait(package: Path, cuda: FakeCuda) -> None:
    launcher = package / "launcher.so"
    device = BenchDevice(CudaApi(), 0, launcher if launcher.exists() else None)
    places = [device.allocate(64) for _ in range(2)]
    program = device.prepare([Copy("on_device", places[1], places[0], 64)])
    stream = device.current_stream()
    program.replay(stream)
    cuda.reset()
    device.waits = False
    for _ in range(3):
        program.replay(stream)
    calls = cuda.calls()
    assert calls.count("cuGraphLaunch") == 3 and "cuStreamSynchronize" not in calls
    device.waits = True
    program.replay(stream)
    assert cuda.calls().count("cuGraphLaunch") == 4 and "cuStreamSynchronize" in cuda.calls()
    device.close()
