"""Object code and libraries: the same bytes everywhere, no symbol that packages lack, old enough a glibc."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.backends.tvm.compile import compile_kernel, link
from llmc.backends.tvm.isa import ISAS
from llmc.backends.tvm.kernels import attention, cache, decode, elementwise, embedding, linear, norm, rotary, rows
from llmc.ir.errors import LlmcError
from tests.fixtures import REPOSITORY

GLIBC = (2, 28)
HEADS = {"q_heads": 6, "kv_heads": 2, "head_dim": 20, "kv_dtype": "f16"}
ALL: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (embedding.embedding, {"vocab": 50, "hidden": 20, "weight_dtype": "bf16"}),
    (embedding.packed_embedding, {"vocab": 50, "hidden": 20, "weight_dtype": "f16"}),
    (norm.rms_norm, {"rows_dim": 0, "hidden": 100, "eps": 1e-5}),
    (norm.add_layer_norm, {"rows_dim": 0, "hidden": 100, "eps": 1e-5}),
    (linear.linear, {"rows_dim": 0, "n": 50, "k": 40, "weight_dtype": "bf16", "bias": True, "epilogue": "gelu_erf"}),
    (linear.gated_linear, {"rows_dim": 0, "n": 50, "k": 40, "weight_dtype": "f16", "activation": "silu"}),
    (rotary.rotary_table, {"rot_dim": 20}),
    (rotary.dynamic_rotary_table, {"rot_dim": 20, "base": 1e4, "factor": 2.0, "max_position_embeddings": 64}),
    (cache.append, {**HEADS, "rot_dim": 20, "layout": "half"}),
    (cache.append, {**HEADS, "kv_dtype": "bf16"}),
    (attention.attention, {**HEADS, "scale": 0.2, "rot_dim": 20}),
    (decode.split_attention, {**HEADS, "scale": 0.2, "splits": 3}),
    (decode.split_attention, {**HEADS, "scale": 0.2, "splits": 3, "kv_dtype": "i8"}),
    (decode.combine_splits, {"q_heads": 6, "head_dim": 20, "splits": 3}),
    (rows.gather_rows, {"width": 20}),
    (rows.argmax, {"n": 50}),
    (elementwise.add, {"rows_dim": 0, "width": 20}),
    (elementwise.unary, {"rows_dim": 0, "width": 20, "activation": "tanh"}),
]


def symbols(path: Path, *options: str) -> list[str]:
    """Names that `nm` prints, without their versions."""
    done = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True)
    return [line.split()[-1].partition("@")[0] for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("maker", "parameters"), ALL, ids=lambda v: getattr(v, "__name__", ""))
def test_kernels_compile_for_every_isa(maker: Callable[..., Any], parameters: dict[str, Any], tmp_path: Path) -> None:
    for isa in ISAS.values():
        path = tmp_path / f"{isa.name}.o"
        path.write_bytes(compile_kernel(maker("the_kernel", isa, **parameters), isa))
        assert "the_kernel" in symbols(path, "--defined-only")
        # memset and memcpy are the C library's, which every package has.
        assert set(symbols(path, "--undefined-only")) <= {"memset", "memcpy"}


def test_wide_registers_are_used(tmp_path: Path) -> None:
    maker, parameters = ALL[4]
    for name, register in (("x86-64-v3", "ymm"), ("x86-64-v4", "zmm")):
        path = tmp_path / "kernel.o"
        path.write_bytes(compile_kernel(maker("k", ISAS[name], **parameters), ISAS[name]))
        code = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert re.search(rf"vfmadd\w+ps .*%{register}", code)


HASHES = """
import hashlib
from llmc.backends.tvm.compile import compile_kernel
from llmc.backends.tvm.isa import ISAS
from tests.backends.tvm.test_compile import ALL
for maker, parameters in ALL[::-1] if {reverse} else ALL:
    isa = ISAS["x86-64-v3"]
    print(maker.__name__, hashlib.sha256(compile_kernel(maker("k", isa, **parameters), isa)).hexdigest())
"""


def test_object_code_is_the_same_in_every_process() -> None:
    printed = [
        subprocess.run(
            [sys.executable, "-c", HASHES.format(reverse=reverse)],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
            check=True,
        ).stdout.splitlines()
        for reverse, seed in ((False, "1"), (True, "2"))
    ]
    assert len(printed[0]) == len(ALL) and sorted(printed[0]) == sorted(printed[1])


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    isa = ISAS["x86-64-v3"]
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    link({n: compile_kernel(rows.gather_rows(n, isa, width=20), isa) for n in ("one", "two")}, isa, path)
    return path


def test_a_library_exports_kernels_and_the_runtime_only(library: Path) -> None:
    exported = set(symbols(library, "-D", "--defined-only"))
    assert {"one", "two", "llmc_step", "llmc_build"} <= exported
    assert all(name in ("one", "two") or name.startswith("llmc_") for name in exported)


def test_a_library_needs_an_old_glibc(library: Path) -> None:
    done = subprocess.run(["readelf", "-V", str(library)], capture_output=True, text=True, check=True)
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_([0-9.]+)", done.stdout)}
    assert versions and max(versions) <= GLIBC
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"NEEDED.*\[(.*)\]", dynamic) == ["libc.so.6"]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_linking_is_reproducible(library: Path, tmp_path: Path) -> None:
    isa = ISAS["x86-64-v3"]
    objects = {n: compile_kernel(rows.gather_rows(n, isa, width=20), isa) for n in ("two", "one")}
    link(objects, isa, tmp_path / "elsewhere.so")
    assert (tmp_path / "elsewhere.so").read_bytes() == library.read_bytes()
    assert str(REPOSITORY).encode() not in library.read_bytes()


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(LlmcError, match=r"needs a C compiler, and 'no-such-compiler' was not found"):
        link({}, ISAS["x86-64-v3"], tmp_path / "k.so")


def test_a_failing_link_says_why(tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=r"gcc failed with exit status 1: .*(\n.*)*broken\.o"):
        link({"broken": b"not an object"}, ISAS["x86-64-v3"], tmp_path / "k.so")
