"""What the GPU does at most, measured before anything else, and what it is."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu.timing import Clock
from benchmarks.measures import Spread

COPIED = 4 << 30
SIDE = 8192
REPEATS, WARMING = 20, 3
QUERIES = (
    "name,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,memory.total"
)


class TorchClock:
    """See `timing.Clock`: events in torch's current stream."""

    def device(self, work: Callable[[], object]) -> float:
        """See `Clock`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def wall(self, work: Callable[[], object]) -> float:
        """See `Clock`."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def measure_ceilings(clock: Clock, device: str = "cuda", copied: int = COPIED, side: int = SIDE) -> dict[str, float]:
    """`copy_bandwidth`: bytes read and written a second of a copy on the device. `read_bandwidth`: bytes read by a sum
    of the same buffer, no more than a lower bound. `matrix_rate`: operations a second of a bf16 product of random
    square matrices. Medians."""
    source = torch.randn(copied // 2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    found = {"copy_bandwidth": 2 * copied / _median(clock, lambda: target.copy_(source))}
    found["read_bandwidth"] = copied / _median(clock, lambda: source.view(torch.float32).amax())
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    found["matrix_rate"] = 2 * side**3 / _median(clock, lambda: torch.mm(a, b, out=product))
    return found


def machine_facts() -> dict[str, Any]:
    """The GPU, its driver, its clocks at this moment, and versions."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": getattr(properties, "L2_cache_size", 0),
        "nvidia_smi": nvidia_smi(),
        "versions": versions(),
        "system": platform.platform(),
    }


def nvidia_smi() -> dict[str, str]:
    """Name, driver, clocks, power and temperature, as the tool says them; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={QUERIES}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERIES.split(","), (part.strip() for part in line.split(",")), strict=False))


def versions() -> dict[str, str]:
    """Python, CUDA as torch was built with it, and the packages that matter."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _median(clock: Clock, work: Callable[[], Any]) -> float:
    for _ in range(WARMING):
        work()
    return Spread.of(clock.device(work) for _ in range(REPEATS)).median
