"""Runs a kernel's source in Triton's interpreter on CPU tensors, with bf16 arithmetic and 8-bit floats made right.

The interpreter keeps bf16 as uint16 and calculates with the bit patterns (triton-lang/triton#11584), and its casts to
8-bit floats round ties upwards and lose carries; the replacements below round as the GPU does. It reads the environment
when triton is imported, so `tests/conftest.py` sets it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

from llmc.backends.triton.source import KernelSource
from tests.backends.triton import on_gpu

assert knobs.runtime.interpret, "triton was imported before TRITON_INTERPRET was set"

TARGET = on_gpu.variant() if os.environ.get("LLMC_TEST_GPU") else None
"""What kernels are made for: the interpreter, or where `make test-gpu` says so the GPU that is there."""

_BUILDER = interpreter.InterpreterBuilder
_HANDLE = interpreter.TensorHandle
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}


def bf16_to_f32(bits: Any) -> Any:
    """uint16 -> f32, exact."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: Any) -> Any:
    """f32 -> uint16, to the nearest, ties to even: what cvt.rn.bf16.f32 does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def f32_to_fp8(values: Any) -> Any:
    """f32 -> uint8, to the nearest, ties to even, saturated: what cvt.rn.satfinite.e4m3x2.f32 does."""
    wide = np.ascontiguousarray(values, dtype=np.float32)
    return np.clip(wide, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def fp8_to_f32(bits: Any) -> Any:
    """uint8 -> f32, exact."""
    return np.ascontiguousarray(bits).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def _widened(handle: Any) -> Any:
    return _HANDLE(bf16_to_f32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _mend() -> None:
    dot, cast, binary, convert = _BUILDER.create_dot, _BUILDER.cast_impl, _BUILDER.binary_op, _BUILDER.create_fp_to_fp

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        if old == tl.bfloat16 and new != tl.bfloat16:
            wide = _widened(source)
            return wide if new == tl.float32 else cast(self, wide, target)
        if new == tl.bfloat16 and old != tl.bfloat16:
            wide = source if old == tl.float32 else _HANDLE(source.data.astype(np.float32), tl.float32)
            return _HANDLE(f32_to_bf16(wide.data), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        old, new = source.dtype.scalar, target.scalar
        kinds = {old, new}
        if new == tl.float8e4nv:
            return _HANDLE(f32_to_fp8(cast_impl(self, source, tl.float32).data), new)
        if old == tl.float8e4nv:
            return cast_impl(self, _HANDLE(fp8_to_f32(source.data), tl.float32), new)
        if tl.bfloat16 in kinds and kinds <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}:
            return cast_impl(self, source, target)
        return convert(self, _widened(source), target, rounding)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if _is_bf16(left) and op not in _BITWISE:
            result = op(bf16_to_f32(left.data), bf16_to_f32(right.data))
            if op in _COMPARISONS:
                return _HANDLE(result, tl.int1)
            return _HANDLE(f32_to_bf16(result), tl.bfloat16)
        result = binary(self, left, right, op)
        # A comparison comes back with its operands' type, and is then refused as a mask.
        return _HANDLE(result.data, tl.int1) if op in _COMPARISONS and result.data.dtype == np.bool_ else result

    _BUILDER.create_dot, _BUILDER.cast_impl = create_dot, cast_impl
    _BUILDER.binary_op, _BUILDER.create_fp_to_fp = binary_op, create_fp_to_fp


_mend()


_FOLDER = tempfile.TemporaryDirectory(prefix="llmc-interpreted-")  # the interpreter reads a function's source again


@functools.cache
def load(name: str, text: str) -> Any:
    """The kernel function of a rendered module."""
    path = Path(_FOLDER.name) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def run(source: KernelSource, grid: Sequence[int], tensors: Mapping[str, torch.Tensor]) -> None:
    """One launch over torch tensors on the CPU, named as the source's arguments are; with a TARGET on its GPU."""
    assert list(tensors) == [name for name, _ in source.arguments], (list(tensors), source.arguments)
    if TARGET is not None:
        on_gpu.run(source, grid, tensors)
        return
    function = load(source.name, source.text)
    constants = dict(source.constants)
    function[tuple(grid)](**tensors, **constants)
