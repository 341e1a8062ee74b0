"""Every family's description against transformers' eager model of the same configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.importers.hf import import_model
from llmc.ir.interpret import interpret
from llmc.ir.verify import verify
from tests.architectures.families import FAMILIES
from tests.tiny_models import difference, logits, make_model, save

TOLERANCE = 1e-5  # float32 against float64


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_graph(family: str, tmp_path: Path) -> None:
    case = FAMILIES[family]
    theirs = make_model(case.model_type, **case.config)
    ours = import_model(save(theirs, tmp_path), max_sequence_length=case.longest)
    verify(ours.graph, "primitive")
    assert ours.info.num_parameters == theirs.num_parameters()
    token_ids: Any = np.random.default_rng(3).integers(0, 503, 41)
    inputs = {"token_ids": token_ids, "positions": np.arange(len(token_ids))}
    found = interpret(ours.graph, inputs, ours.weights.load).outputs["logits"]
    assert difference(found, logits(theirs, token_ids)) < TOLERANCE
