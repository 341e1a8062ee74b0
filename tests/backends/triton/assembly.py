"""The inline assembly of kernels in Triton's interpreter: the few instructions that decode weights, as the PTX ISA has
them, so that what is compiled is what is tested."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_HALVES = {"bf16x2": np.dtype(ml_dtypes.bfloat16), "f16x2": np.dtype(np.float16)}


def mend() -> None:
    """Give the interpreter `inline_asm_elementwise` of one result i32 and one element at a time."""
    interpreter.InterpreterBuilder.create_inline_asm = _create_inline_asm


def _create_inline_asm(
    self: Any, text: str, constraints: str, values: Sequence[Any], kinds: Sequence[Any], pure: bool, pack: int
) -> Any:
    assert pack == 1 and constraints == "=r" + ",r" * len(values), (text, constraints)
    words = [np.ascontiguousarray(v.data).view(np.uint32) for v in values]
    handle = interpreter.TensorHandle(execute(text, words).view(np.int32), tl.int32)
    return _Results(handle)


class _Results:
    """What the language expects of an operation with results."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def get_result(self, index: int) -> Any:
        assert index == 0
        return self.handle


def execute(text: str, operands: Sequence[Any]) -> Any:
    """Words u32 that a text leaves in `$0`, given those in `$1`, `$2`, …"""
    registers: dict[str, Any] = {f"${i + 1}": words for i, words in enumerate(operands)}

    def value(name: str) -> Any:
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for statement in filter(None, (part.strip() for part in text.strip("{} ").split(";"))):
        name, _, rest = statement.partition(" ")
        target, *sources = (part.strip() for part in rest.split(","))
        if name == ".reg":
            continue
        if name == "mov.b32":
            registers[target] = value(sources[0])
        elif name == "lop3.b32":
            a, b, c = map(value, sources[:3])
            registers[target] = _lop3(a, b, c, int(sources[3], 0))
        else:
            half = re.fullmatch(r"fma\.rn\.(bf16x2|f16x2)", name)
            assert half, f"an instruction that is not known here: {statement}"
            a, b, c = map(value, sources)
            registers[target] = _fma(_HALVES[half.group(1)], a, b, c)
    return registers["$0"]


def _lop3(a: Any, b: Any, c: Any, table: int) -> Any:
    """Of each three bits the one that the table has for them."""
    result = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def _fma(half: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c of the numbers in both halves, rounded once."""
    shape = np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c))
    words = [np.ascontiguousarray(np.broadcast_to(w, shape), np.uint32) for w in (a, b, c)]
    x, y, z = (w.view(np.uint16).view(half).astype(np.float64) for w in words)
    return (x * y + z).astype(half).view(np.uint16).view(np.uint32).reshape(shape)
