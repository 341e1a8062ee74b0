"""Quantization formats: name, bits, layout, pack, unpack and error bound. One a file, all in `FORMATS`."""

from __future__ import annotations

from llmc.ir.errors import LlmcError, nearest
from llmc.ir.quant.format import QuantFormat
from llmc.ir.quant.fp8 import FP8
from llmc.ir.quant.q4 import Q4, Q4_G64, Q4_G128
from llmc.ir.quant.q8 import Q8, Q8_G128

FORMATS: dict[str, QuantFormat] = {f.name: f for f in (Q8, Q4, Q8_G128, Q4_G64, Q4_G128, FP8)}
"""Every format by name."""

INTEGER_FORMATS = tuple(name for name, f in FORMATS.items() if f.integer_products)
"""The formats that are multiplied with activations in 8 bits, as on CPUs; the others are for GPUs only."""


def format_named(name: str) -> QuantFormat:
    """The format of that name. Raises `LlmcError` naming the nearest."""
    if name not in FORMATS:
        raise LlmcError(f"there is no weight format {name!r}; {nearest(name, FORMATS)}")
    return FORMATS[name]
