"""Quantization formats: name, bits, layout, pack, unpack and error bound. One a file, all in `FORMATS`."""

from __future__ import annotations

from llmc.ir.errors import LlmcError, nearest
from llmc.ir.quant.format import QuantFormat
from llmc.ir.quant.q4 import Q4
from llmc.ir.quant.q8 import Q8

FORMATS: dict[str, QuantFormat] = {f.name: f for f in (Q8, Q4)}
"""Every format by name."""


def format_named(name: str) -> QuantFormat:
    """The format of that name. Raises `LlmcError` naming the nearest."""
    if name not in FORMATS:
        raise LlmcError(f"there is no weight format {name!r}; {nearest(name, FORMATS)}")
    return FORMATS[name]
