"""What processor this is, and how busy it is with other things."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16", "amx_int8")


def machine_facts() -> dict[str, Any]:
    """Model, cores, flags that kernels use, kernel, memory, and the load at this moment."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    which = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    memory = Path("/proc/meminfo").read_text().split()[1]
    return {
        "processor": f"{fields.get('model name', '?')} ({which})",
        "cores": os.cpu_count(),
        "cache": fields.get("cache size"),
        "flags": [flag for flag in FLAGS if flag in fields.get("flags", "").split()],
        "memory_bytes": int(memory) * 1024,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
    }


def busy_seconds() -> float:
    """Seconds that all cores together were busy since boot, stolen time included."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
