"""`--quant`: names, files, and what a manifest says."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.ir.errors import LlmcError
from llmc.ir.types import DType
from llmc.options import CompileOptions
from llmc.passes.pipelines import step_pipeline
from llmc.passes.quantize import Quantize
from llmc.quantization import described, of_manifest, read_quantization
from tests.passes.graphs import learned_model, rotary_model


def test_names() -> None:
    assert read_quantization(CompileOptions().quant) is None
    assert read_quantization("q4") == Quantize("q4")
    assert read_quantization("q8") == Quantize("q8")
    with pytest.raises(LlmcError, match=r"--quant q44: did you mean 'q4'\? \(or the path of a .toml file\)"):
        read_quantization("q44")


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
        (rotary_model, None, ("none", "none", "none")),
        (rotary_model, Quantize("q4"), ("q4", "q4", "q4")),
        (rotary_model, Quantize("q4", "q8"), ("q4", "q8", "q8")),
        (rotary_model, Quantize("q4", "none"), ("q4", "none", "none")),
        (learned_model, Quantize("q4"), ("q4", "q4", "none")),
        (learned_model, Quantize("none", None, "q8"), ("none", "none", "q8")),
    ],
)
def test_manifests(model: type, quant: Quantize | None, expected: tuple[str, ...]) -> None:
    """What is written says what was done, and doing that again gives the same graph."""
    step = step_pipeline(DType.F16, quant=quant).run(model())
    table = described(quant, step)
    assert tuple(table.values()) == expected
    assert step_pipeline(DType.F16, quant=of_manifest(table)).run(model()) == step
