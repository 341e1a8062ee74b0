from __future__ import annotations

import pytest

from llmc.backends.tvm.isa import ISAS
from llmc.ir.errors import LlmcError
from llmc.ir.target import CPU_VARIANTS, GPU_VARIANTS, PORTABLE, parse_target

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


def test_architectures_of_gpus_are_named() -> None:
    target = parse_target("cuda:sm_90,sm_80,sm_90", frozenset())
    assert target.kind == "cuda" and [v.name for v in target.gpu_variants] == ["sm_80", "sm_90"]
    assert target.machine == "x86_64" and not target.cpu_variants
    assert [v.has_fp8 for v in target.gpu_variants] == [False, True]
    assert [v.has_dependent_launch for v in target.gpu_variants] == [False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda", r"name the architectures, as in cuda:sm_90; known: sm_80, sm_86, sm_89, sm_90, sm_100"),
        ("cuda:sm_91", r"unknown architecture 'sm_91'; .*sm_90"),
        ("cuda:sm_90,", r"unknown architecture ''"),
        ("rocm", r"expected 'cpu'.*'cuda:ARCHITECTURE,…' with architectures of sm_80"),
    ],
)
def test_mistakes_in_gpu_targets(text: str, message: str) -> None:
    with pytest.raises(LlmcError, match=message):
        parse_target(text, frozenset())


def test_issue_rates_are_those_of_the_chips() -> None:
    # 132 multiprocessors of 4 schedulers that start an instruction of 32 threads each cycle, at 1.98 GHz
    assert GPU_VARIANTS["sm_90"].issue_rate == pytest.approx(33.5e12, rel=0.01)
