"""Pipelines on text: limits that bisect, and explanations of what did not fire."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from llmc.ir.errors import LlmcError, ParseError
from llmc.ir.text import parse
from llmc.passes.opt import optimize_file, optimize_text
from llmc.passes.pipelines import COMMON
from tests.passes.graphs import rotary_model

TEXT = str(rotary_model(layers=1))


def test_text_in_text_out() -> None:
    text, report = optimize_text(TEXT, str(COMMON))
    assert text == str(COMMON.run(rotary_model(layers=1)))
    assert report == ""


def test_a_limit_bisects() -> None:
    texts = [optimize_text(TEXT, "raise-linear,fuse-norm", limit=n)[0] for n in range(14)]
    assert texts[0] == TEXT
    assert all(a != b for a, b in pairwise(texts[:13]))
    assert texts[13] == optimize_text(TEXT, "raise-linear,fuse-norm")[0]


def test_explanations() -> None:
    _, report = optimize_text(TEXT, "fuse-norm", explain="fuse-norm")
    assert report.startswith("fuse-norm:\n  layer-norm: fired 0 times, refused ")
    assert "  add-rms-norm: fired 2 times, refused 1 times\n    1 x want add, found embedding, first at " in report
    _, report = optimize_text(TEXT, "canonicalize,fuse-rope", explain="rotary-table")
    assert report == "fuse-rope:\n  rotary-table: fired 1 times, refused 0 times\n"
    _, report = optimize_text(TEXT, "plan-memory", explain="plan-memory")
    assert report == "plan-memory: it has no rules\n"


def test_the_same_reason_is_said_once() -> None:
    _, report = optimize_text(str(rotary_model(layers=3)), "raise-linear", explain="linear")
    assert "6 x the right operand does not depend on parameters alone" in report


def test_mistakes() -> None:
    with pytest.raises(LlmcError, match=r"no pass or rule 'fuse-nrm' ran; did you mean 'fuse-norm'\?"):
        optimize_text(TEXT, "fuse-norm", explain="fuse-nrm")
    with pytest.raises(ParseError, match="there is no pass 'nothing'"):
        optimize_text(TEXT, "nothing")
    with pytest.raises(ParseError, match=r"line 1: expected 'graph NAME \{'"):
        optimize_text("module {}", "canonicalize")
    with pytest.raises(LlmcError, match=r"pass specialize.*run paged-kv first"):
        optimize_text(TEXT, "specialize{entry=decode}")


def test_an_ill_typed_text_is_refused() -> None:
    wrong = TEXT.replace(": f32[tokens, 16] @embed", ": f32[tokens, 17] @embed", 1)
    assert wrong != TEXT
    with pytest.raises(LlmcError, match=r"recorded as f32\[tokens, 17\], inferred as f32\[tokens, 16\]"):
        optimize_text(wrong, "canonicalize")


def test_files(tmp_path: Path) -> None:
    """A constant that folding makes is stored beside the file, so that the result can be read."""
    table = ", ".join(str(float(i)) for i in range(10))
    lines = [
        "graph main {",
        f"  %0 = constant() {{dtype=f32, value=[{table}]}} : f32[10]",
        "  %1 = concat(%0, %0) {axis=0} : f32[20]",
        "  return out=%1",
        "}",
    ]
    path = tmp_path / "small.ir"
    path.write_text("\n".join(lines))
    text, _ = optimize_file(path, "constant-fold")
    assert "sha256(" in text
    (tmp_path / "folded.ir").write_text(text)
    assert optimize_file(tmp_path / "folded.ir", "canonicalize")[0] == text
    with pytest.raises(LlmcError, match="cannot read"):
        optimize_file(tmp_path / "absent.ir", "canonicalize")
    with pytest.raises(ParseError, match=r"the constant [0-9a-f]{12}… was not given"):
        parse(text)
