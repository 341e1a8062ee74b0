"""The GPUs on which `--tune` measures: those of this machine that a target names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from llmc.ir.errors import LlmcError
from llmc.ir.target import Target
from llmc.runtime.cuda_api import CudaApi
from llmc.runtime.cuda_device import CudaDevice
from llmc.runtime.cuda_driver import Device
from llmc.runtime.errors import ModelError


class Gpu(Device, Protocol):
    """A device that knows what it is."""

    capability: tuple[int, int]


@contextmanager
def tuning_devices(target: Target) -> Iterator[dict[str, Gpu]]:
    """The first GPU of each of the target's architectures, by the architecture's name. Raises `LlmcError` for a target
    without any, and where this machine has none of them."""
    if target.kind != "cuda":
        raise LlmcError(
            "--tune measures kernels for GPUs, and the target is a CPU: leave --tune out, or compile for"
            " --target cuda:ARCHITECTURE"
        )
    wanted = {v.capability: v.name for v in target.gpu_variants}
    names = ", ".join(wanted.values())
    opened: list[Gpu] = []
    found: dict[str, Gpu] = {}
    try:
        try:
            for gpu in open_gpus():
                opened.append(gpu)
                if gpu.capability in wanted:
                    found.setdefault(wanted[gpu.capability], gpu)
        except ModelError as error:
            raise _nothing(names, f"there is none: {str(error).partition('; ')[0]}") from error
        if not found:
            here = ", ".join(f"{g.name} of architecture sm_{g.capability[0]}{g.capability[1]}" for g in opened)
            raise _nothing(names, f"this machine has {here or 'none'}")
        yield found
    finally:
        for gpu in opened:
            gpu.close()


def open_gpus() -> Iterator[Gpu]:
    """Every GPU that this process sees. Raises `ModelError` where there is no driver or no GPU."""
    api = CudaApi()
    for ordinal in range(max(1, api.device_count())):  # of none, the first refuses with the reason
        yield CudaDevice(api, ordinal)


def _nothing(names: str, what: str) -> LlmcError:
    return LlmcError(
        f"--tune measures on a GPU of the target's architecture ({names}), and {what}; without --tune a model of the"
        " architecture chooses, on any machine"
    )
