"""Which variant a machine gets, and what it is told when it gets none."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from llmc.runtime.errors import ModelError
from llmc.runtime.manifest import Manifest, ModelFacts, Variant
from llmc.runtime.processor import check_machine, choose_variant, processor_features, this_libc, this_processor

VARIANTS = [
    Variant("x86-64-v4", "a.so", "w", ("avx2", "fma", "f16c", "avx512f", "avx512bw")),
    Variant("x86-64-v3", "b.so", "w", ("avx2", "fma", "f16c")),
    Variant("avx512-vnni", "c.so", "w", ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vnni")),
]
V3 = "processor\t: 0\nflags\t\t: fpu sse4_2 avx2 fma f16c\nbugs\t\t: avx512f\n\nprocessor\t: 1\nflags\t\t: fpu\n"


@pytest.mark.parametrize(
    ("more", "name"),
    [("", "x86-64-v3"), ("avx512f avx512bw", "x86-64-v4"), ("avx512f avx512bw avx512_vnni", "avx512-vnni")],
)
def test_the_variant_that_asks_most(more: str, name: str) -> None:
    features = processor_features(V3.replace("f16c", f"f16c {more}"))
    assert choose_variant(VARIANTS, features).name == name
    assert choose_variant(VARIANTS, features, "x86-64-v3").name == "x86-64-v3"


def test_arm_calls_them_features() -> None:
    assert processor_features("BogoMIPS\t: 1\nFeatures\t: fp asimd sve_2\n") == {"fp", "asimd", "sve2"}
    assert processor_features("nothing") == frozenset()


def test_missing_features_are_named() -> None:
    with pytest.raises(ModelError, match="x86-64-v3 needs fma, f16c"):
        choose_variant(VARIANTS[1:2], frozenset({"avx2"}))
    with pytest.raises(ModelError, match="avx512-vnni needs avx512f, avx512bw, avx512vnni"):
        choose_variant(VARIANTS, processor_features(V3), "avx512-vnni")
    with pytest.raises(ValueError, match="given 'cpu:v5', expected one of"):
        choose_variant(VARIANTS, processor_features(V3), "v5")


def test_this_machine_has_features() -> None:
    assert len(this_processor()) > 5


def package(machine: str | None, glibc: tuple[int, ...] | None) -> Manifest:
    facts = ModelFacts("tiny", 1, 1, None, (), False)
    return Manifest(Path(), "tiny", facts, "cpu", machine, (), glibc, {}, {})


def test_the_c_library() -> None:
    check_machine(package("x86_64", (2, 28)), "x86_64", "glibc 2.28")
    check_machine(package(None, (2, 28)), "x86_64", "glibc 2.100")
    check_machine(package(None, None), "x86_64", None)
    for libc, message in ((None, "another C library"), ("glibc 2.17", "this system has 2.17"), ("musl 1.2", "musl")):
        with pytest.raises(ModelError, match=f"needs glibc 2.28 or newer, this system has .*{message.split()[-1]}"):
            check_machine(package(None, (2, 28)), "x86_64", libc)
    with pytest.raises(ModelError, match="was compiled for aarch64, this machine is x86_64"):
        check_machine(package("aarch64", None), "x86_64", "glibc 2.30")
    check_machine(package(platform.machine(), (2, 17)), platform.machine(), this_libc())
