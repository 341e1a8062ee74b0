"""From the files of a package for GPUs to an executor: which device, which of the package's variants, which code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .cuda_api import CudaApi, in_words
from .cuda_device import CudaDevice
from .cuda_executor import CudaExecutor
from .cuda_kernels import read_images, read_kernels
from .cuda_plan import read_cuda_plan
from .errors import ModelError
from .manifest import Manifest, Variant

_LAST_NOT_EXACT = (8, 9)
_DEVICE = re.compile(r"cuda(?::([0-9]{1,4}))?")


@dataclass(frozen=True)
class Choice:
    """A variant for a device; `ptx`: its text, which the driver compiles, as there is no code for the device."""

    variant: Variant
    ptx: bool


def wanted_ordinal(device: Any) -> int:
    """The number of the GPU that `device` names. Raises `ValueError`."""
    if device is None:
        return 0
    found = _DEVICE.fullmatch(device) if isinstance(device, str) else None
    if found is None:
        raise ValueError(f"device: given {device!r}, expected None, 'cuda' or 'cuda:N': the package runs on a GPU")
    return int(found[1] or 0)


def choose_cuda_variant(variants: Sequence[Variant], capability: tuple[int, int], device: str) -> Choice:
    """The variant for a device of this compute capability.

    Code runs on its own architecture and, unless it is exact, on later ones of the same major version. For an
    architecture that came later still, the driver can compile the text of an earlier one. Raises `ModelError` naming
    what there is.
    """
    fitting = [
        (v.capability, v)
        for v in variants
        if v.capability is not None and (v.capability == capability or (v.capability < capability and not v.exact))
    ]
    if not fitting:
        have = ", ".join(v.name + (" (and no later one)" if v.exact else "") for v in variants) or "nothing"
        other = ", or for cuda:sm_89, whose code later GPUs take too" if capability > _LAST_NOT_EXACT else ""
        raise ModelError(
            f"{device} has compute capability {capability_text(capability)}, and the package holds {have}: "
            f"compile it for cuda:sm_{capability[0]}{capability[1]}{other}"
        )
    found, variant = max(fitting, key=lambda pair: pair[0])
    return Choice(variant, ptx=found[0] != capability[0])


def load_cuda(manifest: Manifest, ordinal: int) -> tuple[CudaExecutor, dict[str, Any]]:
    """The executor of a package whose files have been checked, and what `info` says of how it was loaded."""
    api = CudaApi()
    device = CudaDevice(api, ordinal, manifest.path(manifest.launcher) if manifest.launcher else None)
    try:
        choice = choose_cuda_variant(manifest.variants, device.capability, device.name)
        variant = choice.variant
        assert variant.resources is not None
        weights_bytes = manifest.files[variant.weights].bytes
        kernels = read_kernels(manifest.path(variant.resources))
        plan = read_cuda_plan(manifest.path(variant.plan), weights_bytes, kernels)
        used = {symbol: kernels[symbol] for symbol in plan.kernels}
        for kernel, image in read_images(manifest.path(variant.kernels), used, choice.ptx):
            device.load(kernel, image)
        executor = CudaExecutor(
            plan,
            used,
            device,
            manifest.path(variant.weights),
            weights_bytes,
            manifest.model.vocab_size,
            -(-manifest.model.max_sequence_length // plan.block_size),
        )
    except BaseException:
        device.close()
        raise
    return executor, {
        "device": device.name,
        "capability": capability_text(device.capability),
        "driver": in_words(api.version),
        "variant": variant.name,
        "code": "PTX, compiled by the driver" if choice.ptx else "cubin",
        "launcher": device.launcher,
        "memory": executor.memory.info(),
    }


def capability_text(capability: tuple[int, int]) -> str:
    """A compute capability as it is written: 9.0."""
    return f"{capability[0]}.{capability[1]}"
