"""Random weights, keys and values, made where they are used. Never zeros: matrix units are faster on zeros.

Their scale is such that activations stay finite: matrices have a standard deviation of width^-0.5, norms are 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

CHUNK = 1 << 26
"""Elements that are made at a time where they are made in float32 first."""
CODE_RMS = {"q4": 4.6, "q8": 73.9, "fp8": 1.0}
"""Root mean square of random codes of a format: of integers evenly spread over -8..7 and -128..127, and of what is
written as f8e4m3."""
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f8e4m3": torch.float8_e4m3fn}
CODES = ("i8", "u8", "i16", "u16", "i32", "u32")
_FORMAT = re.compile(r"format=(q4|q8|fp8)")


class DeviceMemory:
    """Memory of a GPU that somebody else took, for `torch.as_tensor`."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def device_bytes(address: int, size: int) -> torch.Tensor:
    """u8[size] over device memory; whoever took it must keep it."""
    return torch.as_tensor(DeviceMemory(address, size), device="cuda")


def fill_parameters(
    memory: torch.Tensor, parameters: Iterable[Mapping[str, Any]], width: int, constants: Mapping[str, torch.Tensor]
) -> None:
    """Fill a region of weights, u8, as a plan's buffers of kind `param` divide it: name, dtype, offset, bytes.

    `width` is the model's. `constants`: the bytes of tables that are no weights, by a parameter's name.
    """
    for parameter in parameters:
        name, start = parameter["name"], parameter["offset"]
        part = memory[start : start + parameter["bytes"]]
        if name in constants:
            part.copy_(constants[name])
        else:
            fill_parameter(part, name, parameter["dtype"], width)


def fill_parameter(part: torch.Tensor, name: str, dtype: str, width: int) -> None:
    """One parameter's bytes. Raises `ValueError` for a dtype that nothing is known of."""
    if dtype in CODES:
        part.random_(0, 256)
        return
    if dtype not in DTYPES:
        raise ValueError(f"{name}: no random values for the dtype {dtype}")
    values, found = part.view(DTYPES[dtype]), _FORMAT.search(name)
    if dtype == "f8e4m3":
        write_normal(values, 1.0)
    elif name.startswith("constant:"):
        values.uniform_(0.0, 1.0)
    elif "scale" in name and found is not None:
        step = width**-0.5 / CODE_RMS[found[1]]
        values.uniform_(0.5 * step, 1.5 * step)
    elif "norm" in name and not name.startswith("pack"):
        values.fill_(1.0)
    else:
        write_normal(values, width**-0.5)


def fill_state(part: torch.Tensor, dtype: str) -> None:
    """Keys or values, of standard deviation 1; codes of 8 bits, and in f32 the scales that make them so."""
    if dtype in CODES:
        part.random_(0, 256)
    elif dtype == "f32":
        part.view(torch.float32).uniform_(0.5 / CODE_RMS["q8"], 1.5 / CODE_RMS["q8"])
    else:
        write_normal(part.view(DTYPES[dtype]), 1.0)


def write_normal(values: torch.Tensor, deviation: float) -> None:
    """Normal values; through float32 where the dtype has no generator of its own."""
    if values.dtype is not torch.float8_e4m3fn:
        values.normal_(0.0, deviation)
        return
    for part in values.split(CHUNK):
        part.copy_(torch.empty(part.numel(), device=part.device).normal_(0.0, deviation))
