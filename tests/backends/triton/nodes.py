"""One node of a lowered graph, on the grid and with the arguments that `select` gives it, in the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmc.backends.triton.kernels import source_of
from llmc.backends.triton.select import Step, select
from llmc.ir.graph import Input
from llmc.ir.op import Node, Value
from llmc.ir.target import GPU_VARIANTS
from llmc.ir.types import DType, TensorType
from llmc.passes.plan_memory import storage
from tests.backends.triton.interpreter import TARGET, run

Array = npt.NDArray[Any]


def leaf(name: str, dtype: DType, shape: Sequence[Any]) -> Value:
    """An operand."""
    return Value(Node(Input(name), (), (TensorType(dtype, tuple(shape)),)))


def step_of(tokens: int, sequences: int = 1, decode: bool = True, longest: int = 256) -> Step:
    """A step on a chip with many multiprocessors."""
    return Step(GPU_VARIANTS["sm_90"], tokens, sequences, tokens, longest, decode)


def run_node(node: Node, step: Step, arrays: Mapping[Value, Array], sizes: Mapping[str, int]) -> dict[Value, Array]:
    """The node's results, as storage arrays. `arrays` are its operands' storage arrays; `sizes` the symbols' values.

    Results that are states are their operands, written in place.
    """
    chosen = select(node, step)
    assert chosen is not None
    source = source_of(chosen.spec, TARGET)
    tensors: dict[Value, torch.Tensor] = {v: as_tensor(a, v.type.dtype) for v, a in arrays.items()}
    for value in node.results:
        root = storage(value)
        if root not in tensors:
            shape = value.type.concrete(dict(sizes))
            filled = np.full(shape, np.nan) if value.type.dtype.is_float else np.full(shape, -1)
            tensors[root] = as_tensor(filled.astype(value.type.dtype.numpy), value.type.dtype)
    given = [tensors[storage(v)] for v in chosen.arguments]
    tickets = torch.zeros(max(1, chosen.tickets), dtype=torch.int32)
    if chosen.shares:
        given += [torch.full((max(1, chosen.workspace // 4),), torch.nan), tickets]
    order = ("tokens", "sequences", "max_blocks", "outputs")
    given.append(torch.tensor([sizes.get(n, 1) for n in order], dtype=torch.int32))
    named = zip(source.arguments, given, strict=True)
    run(source, chosen.grid, {name: t.view(torch.float8_e4m3fn) if "fp8" in of else t for (name, of), t in named})
    assert not tickets.any()
    return {v: as_array(tensors[storage(v)], v.type.dtype) for v in node.results}


def as_tensor(array: Array, dtype: DType) -> torch.Tensor:
    """A storage array as torch has it, 8-bit floats as bytes."""
    copied = np.array(array, order="C")
    if dtype is DType.BF16:
        return torch.from_numpy(copied.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(copied.view(np.uint8) if dtype is DType.F8E4M3 else copied)


def as_array(tensor: torch.Tensor, dtype: DType) -> Array:
    """The inverse of `as_tensor`."""
    if dtype is DType.BF16:
        return tensor.view(torch.uint16).numpy().view(dtype.numpy)
    return tensor.numpy().view(dtype.numpy)
