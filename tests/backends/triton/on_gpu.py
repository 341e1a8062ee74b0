"""Runs a kernel on the GPU that is there, through the launcher that packages use: what `make test-gpu` does."""

from __future__ import annotations

import atexit
import functools
from collections.abc import Mapping, Sequence

import torch

from llmc.backends.triton.compile import compile_sources
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GPU_VARIANTS, GpuVariant
from llmc.runtime.cuda_api import CudaApi
from llmc.runtime.cuda_device import CudaDevice
from llmc.runtime.cuda_driver import Copy, KernelLaunch
from llmc.runtime.cuda_kernels import Kernel


@functools.cache
def device() -> CudaDevice:
    """The first GPU."""
    found = CudaDevice(CudaApi(), 0, None)
    atexit.register(found.close)
    return found


@functools.cache
def variant() -> GpuVariant:
    """The architecture of the first GPU, or the newest whose code it runs."""
    own = device().capability
    major = [v for v in GPU_VARIANTS.values() if v.capability[0] == own[0] and (v.capability == own or not v.exact)]
    return max((v for v in major if v.capability <= own), key=lambda v: v.capability)


@functools.cache
def _kernel(source: KernelSource) -> Kernel:
    """The kernel, compiled and loaded."""
    (made,) = compile_sources([source], variant()).values()
    kernel = Kernel(source.name, made.function, made.threads, made.shared, made.arguments, made.dependent)
    device().load(kernel, made.cubin)
    return kernel


def run(source: KernelSource, grid: Sequence[int], tensors: Mapping[str, torch.Tensor]) -> None:
    """One launch over tensors in host memory: they are copied to the device, and back when it is done."""
    gpu, kernel = device(), _kernel(source)
    stream = gpu.current_stream()
    flat = {name: tensor.contiguous() for name, tensor in tensors.items()}
    places = {name: gpu.allocate(max(1, tensor.nbytes)) for name, tensor in flat.items()}
    for name, tensor in flat.items():
        gpu.copy(Copy("to_device", places[name], tensor.data_ptr(), tensor.nbytes), stream)
    gpu.prepare([KernelLaunch(kernel, (grid[0], grid[1], grid[2]), tuple(places.values()))]).run(stream)
    for name, tensor in flat.items():
        gpu.copy(Copy("to_host", tensor.data_ptr(), places[name], tensor.nbytes), stream)
    gpu.synchronize(stream)
    for name, tensor in flat.items():
        if tensor.data_ptr() != tensors[name].data_ptr():
            tensors[name].copy_(tensor)
