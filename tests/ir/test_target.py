from __future__ import annotations

import pytest

from llmc.backends.tvm.isa import ISAS
from llmc.ir.errors import LlmcError
from llmc.ir.target import CPU_VARIANTS, PORTABLE, parse_target

EVERYTHING = frozenset(flag for v in CPU_VARIANTS.values() if v.machine == "x86_64" for flag in v.requires)


def names(text: str, flags: frozenset[str] = EVERYTHING) -> list[str]:
    return [v.name for v in parse_target(text, flags).variants]


def test_the_best_variant_that_keeps_accuracy() -> None:
    assert names("cpu") == ["avx512-vnni"]
    assert names("cpu", EVERYTHING - {"avx512_vnni"}) == ["x86-64-v4"]
    assert names("cpu:portable") == list(PORTABLE)
    assert not any(CPU_VARIANTS[name].rounds for name in PORTABLE)


def test_what_rounds_activations_is_asked_for() -> None:
    assert names("cpu:avx512-bf16", frozenset()) == ["avx512-bf16"]
    assert names("cpu:x86-64-v3,avx512-bf16") == ["x86-64-v3", "avx512-bf16"]
    assert all(ISAS[v.name].bf16_dot == v.rounds for v in CPU_VARIANTS.values())


def test_mistakes_name_the_nearest() -> None:
    with pytest.raises(LlmcError, match="avx512-bf16"):
        parse_target("cpu:avx512-bf61", frozenset())
    with pytest.raises(LlmcError, match="supports none of"):
        parse_target("cpu", frozenset())
