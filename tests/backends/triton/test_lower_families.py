"""Families' step graphs in ops that have Triton kernels: the same function, and how many launches a layer takes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from llmc.backends.buffers import is_view
from llmc.backends.triton.lower import entry_graph, lower
from llmc.entries import specialised
from llmc.importers.hf import import_model
from llmc.ir.graph import Graph
from llmc.ir.ops.elementwise import Add
from llmc.ir.ops.norm import NormHeads
from llmc.ir.text import parse
from llmc.ir.types import DType
from llmc.ir.verify import verify
from llmc.options import Limits
from llmc.passes.pipelines import step_pipeline
from tests.architectures.families import FAMILIES
from tests.backends.triton.test_lower import run
from tests.tiny_models import make_model, save

LAUNCHES = {
    "mistral": (5, 7),
    "qwen3": (6, 8),
    "gemma2": (7, 9),
    "olmo2": (8, 8),
    "granite": (5, 7),
    "cohere": (6, 6),
    "phi": (6, 6),
    "gpt_neox": (7, 7),
    "bloom": (7, 7),
}
"""Of a layer, in decode and in prefill."""


def step_of(family: str, folder: Path, kv: DType) -> Graph:
    case = FAMILIES[family]
    saved = save(make_model(case.model_type, **case.config), folder)
    return step_pipeline(kv, 16).run(import_model(saved).graph)


@pytest.mark.parametrize("kv", [DType.F32, DType.I8], ids=str)
@pytest.mark.parametrize("family", LAUNCHES)
def test_the_same_function(family: str, kv: DType, tmp_path: Path) -> None:
    step = step_of(family, tmp_path, kv)
    for entry, most in zip(("decode", "prefill"), LAUNCHES[family], strict=True):
        before, after = (dict(specialised(g, Limits()))[entry] for g in (step, lower(step, DType.F32)))
        after = entry_graph(entry, after)
        verify(after)
        assert parse(str(after), after.constants) == after
        launched = [n for n in after.nodes if n not in after.parameter_only and not is_view(n)]
        assert not any(isinstance(n.op, Add) for n in launched)
        # Codes are appended by a kernel of their own, as keys with norms always are.
        separate = kv is DType.I8 and not any(isinstance(n.op, NormHeads) for n in step.nodes)
        layer = [n for n in launched if re.search(r"\.1(\.|$)", n.loc)]
        assert len(layer) == most + separate, [n.op.name for n in layer]
        want, got = run(before, before), run(after, before)
        assert np.array_equal(got.pop("chosen"), got["greedy"])
        for label, expected in want.items():
            largest = np.nanmax(np.abs(expected), initial=1e-3)
            np.testing.assert_allclose(got[label], expected, rtol=0, atol=1e-9 * largest, equal_nan=True, err_msg=label)
