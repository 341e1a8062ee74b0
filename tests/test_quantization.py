"""`--quant`: names, files, and what a manifest says."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.driver import compile_model
from llmc.dtypes import check_kv_quant
from llmc.ir.errors import LlmcError
from llmc.ir.quant import FORMATS, INTEGER_FORMATS
from llmc.ir.target import Target, parse_target
from llmc.ir.types import DType
from llmc.options import CompileOptions
from llmc.passes.pipelines import step_pipeline
from llmc.passes.quantize import INT8, KEPT, Quantize
from llmc.quantization import activations_of, described, of_manifest, read_quantization
from tests.passes.graphs import learned_model, rotary_model


def test_names() -> None:
    assert read_quantization(CompileOptions().quant) is None
    assert read_quantization("q4") == Quantize("q4")
    assert read_quantization("q8") == Quantize("q8")
    with pytest.raises(LlmcError, match=r"--quant q44: did you mean 'q4'\? \(or the path of a .toml file\)"):
        read_quantization("q44")
    with pytest.raises(LlmcError, match=r"--quant q5: known: none, q4, q8 \(or"):
        read_quantization("q5")
    with pytest.raises(LlmcError, match=r"--quant q5: known: fp8, none, q4, q4g128, q4g64, q8, q8g128 \(or"):
        read_quantization("q5", KEPT)


def test_activations_follow_from_the_target() -> None:
    assert activations_of(parse_target("cpu:portable", frozenset())) == INT8
    assert activations_of(Target("cuda", ())) == KEPT


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in INTEGER_FORMATS])
def test_formats_for_gpus(name: str, tmp_path: Path) -> None:
    """A GPU target takes all; a CPU target says what it takes, before anything of the model is read."""
    assert read_quantization(name, KEPT) == Quantize(name, activations=KEPT)
    reason = f"{name} is for GPU targets only, where activations keep their dtype; a CPU target takes none, q8, q4$"
    with pytest.raises(LlmcError, match=f"^--quant: {reason}"):
        compile_model(tmp_path / "no model", tmp_path / "out", CompileOptions(target="cpu:x86-64-v3", quant=name))
    file = tmp_path / "formats.toml"
    file.write_text(f"format = 'q4'\nlm_head = '{name}'")
    assert read_quantization(str(file), KEPT) == Quantize("q4", name, activations=KEPT)
    with pytest.raises(LlmcError, match=f"^--quant {file}: lm_head: {reason}"):
        compile_model(tmp_path / "no model", tmp_path / "out", CompileOptions(target="cpu:x86-64-v3", quant=str(file)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("cuda:sm_80,sm_90", {"quant": "fp8"}, "^--quant fp8: sm_80 cannot read 8-bit floats, .* sm_89; leave it out"),
        ("cuda:sm_86,sm_80", {"kv_quant": "fp8"}, "^--kv-quant fp8: sm_80, sm_86 cannot .* leave them .* int8$"),
        ("cuda:sm_80", {"quant": "fp8", "kv_quant": "fp8"}, "^--quant fp8 and --kv-quant fp8: sm_80 cannot"),
    ],
)
def test_8_bit_floats_are_refused_where_a_chip_has_none(
    target: str, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    """Before anything of the model is read."""
    with pytest.raises(LlmcError, match=message):
        compile_model(tmp_path / "no model", tmp_path / "out", CompileOptions(target=target, **options))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fp8", "^--kv-quant fp8 is for GPU targets only; a CPU target takes none, f16, bf16, f32, int8$"),
        ("int4", r"^--kv-quant int4: did you mean 'int8'\?$"),
        ("e5m2", "^--kv-quant e5m2: known: bf16, f16, f32, int8, none$"),
    ],
)
def test_caches_that_a_cpu_has_not(given: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=message):
        compile_model(tmp_path / "no model", tmp_path / "out", CompileOptions(target="cpu:x86-64-v3", kv_quant=given))
    assert not (tmp_path / "out").exists()


def test_caches_of_gpus() -> None:
    for name in ("none", "f16", "bf16", "f32", "int8", "fp8", None):
        check_kv_quant(name, Target("cuda", ()))
    with pytest.raises(LlmcError, match=r"^--kv-quant fp16: did you mean 'f16'\?$"):
        check_kv_quant("fp16", Target("cuda", ()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("format = 'none'\nembedding = 'none'", None),
        ("format = 'q4'", Quantize("q4")),
        ("linear = 'q4'\nlm_head = 'q8'", Quantize("q4", "q8")),
        ("linear = 'q4'\nlm_head = 'none'\nembedding = 'q8'", Quantize("q4", "none", "q8")),
        ("lm_head = 'q4'", Quantize("none", "q4")),
        ("embedding = 'q4'", Quantize("none", None, "q4")),
    ],
)
def test_files(text: str, expected: Quantize | None, tmp_path: Path) -> None:
    path = tmp_path / "formats.toml"
    path.write_text(text)
    assert read_quantization(str(path)) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"format = 'q5'", "formats.toml: format: there is no weight format 'q5'; known: none, q4, q8"),
        (b"lm_haed = 'q8'", "formats.toml: there is no key 'lm_haed'; did you mean 'lm_head'"),
        (b"format = 4", "formats.toml: format is 4; expected none, q8, q4 as text"),
        (b"format = 'q4'\nlinear = 'q4'", "two names of one key"),
        (b"format = ", "is no TOML"),
        (b"\xff\xfe", "is no TOML"),
        (b"#" * 70000, "has at most 65536 bytes"),
    ],
)
def test_files_with_mistakes(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "formats.toml"
    path.write_bytes(data)
    with pytest.raises(LlmcError, match=message):
        read_quantization(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path / "folder.toml"):
        (tmp_path / "folder.toml").mkdir(exist_ok=True)
        with pytest.raises(LlmcError, match=f"--quant: cannot read {path}"):
            read_quantization(str(path))


@pytest.mark.parametrize(
    ("model", "quant", "expected"),
    [
        (rotary_model, None, ("none", "none", "none", "kept")),
        (rotary_model, Quantize("q4"), ("q4", "q4", "q4", "int8")),
        (rotary_model, Quantize("q4", "q8"), ("q4", "q8", "q8", "int8")),
        (rotary_model, Quantize("q4", "none"), ("q4", "none", "none", "int8")),
        (rotary_model, Quantize("q4", "fp8", activations=KEPT), ("q4", "fp8", "fp8", "kept")),
        (learned_model, Quantize("q4"), ("q4", "q4", "none", "int8")),
        (learned_model, Quantize("none", None, "q8"), ("none", "none", "q8", "int8")),
        (learned_model, Quantize("none", None, "q4g64", KEPT), ("none", "none", "q4g64", "kept")),
    ],
)
def test_manifests(model: type, quant: Quantize | None, expected: tuple[str, ...]) -> None:
    """What is written says what was done, and doing that again gives the same graph."""
    step = step_pipeline(DType.F16, quant=quant).run(model())
    table = described(quant, step)
    assert tuple(table[k] for k in ("weights", "lm_head", "embedding", "activations")) == expected
    assert step_pipeline(DType.F16, quant=of_manifest(table)).run(model()) == step


def test_a_manifest_without_activations_is_of_a_cpu() -> None:
    table = {"weights": "q4", "lm_head": "q8", "embedding": "none", "kv": "f16"}
    assert of_manifest(table) == Quantize("q4", "q8", "none", INT8)
