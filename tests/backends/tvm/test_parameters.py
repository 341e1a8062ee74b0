"""Names of what the pack program makes."""

from __future__ import annotations

from llmc.backends.buffers import parameter_name
from llmc.ir.builder import Builder
from llmc.ir.types import DType


def test_two_results_of_one_node_have_two_names() -> None:
    """Codes and scales come from one expression; under one name one of them would be lost."""
    b = Builder()
    weights = [b.param(label, DType.F32, (4, 32)) for label in ("w", "v")]
    values = [v for w in weights for form in ("q4", "q8") for v in b.quantize_weight(w, format=form)]
    again = [v for w in weights for form in ("q4", "q8") for v in b.quantize_weight(w, format=form)]
    assert len({parameter_name(v) for v in values}) == 8
    assert [parameter_name(v) for v in values] == [parameter_name(v) for v in again]
