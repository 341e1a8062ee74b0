"""The golden-file helper itself, on a runner that shouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import check, golden_files, parse

TEXT = "// a remark\n// RUN: shout\n// RUN: twice\n\nhello\n// ---\nHELLO shout,twice\n"


def shout(pipeline: str, text: str) -> str:
    return f"{text.strip().upper()} {pipeline}\n\n"


def test_parse_takes_apart_and_str_puts_together() -> None:
    golden = parse(TEXT, "a.ir")
    assert (golden.pipeline, golden.input, golden.expected) == ("shout,twice", "\nhello\n", "HELLO shout,twice\n")
    assert str(golden) == TEXT


def test_check_passes_and_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.ir"
    path.write_text(TEXT)
    check(path, shout)
    with pytest.raises(AssertionError, match="the output changed"):
        check(path, lambda pipeline, text: text)
    assert path.read_text() == TEXT


@pytest.mark.parametrize("start", [TEXT.replace("HELLO", "stale"), TEXT.partition("// ---")[0]])
def test_accept_rewrites_the_expected_part_only(tmp_path: Path, start: str) -> None:
    path = tmp_path / "a.ir"
    path.write_text(start)
    check(path, shout, accept=True)
    assert path.read_text() == TEXT
    check(path, shout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello\n// ---\n", "expected a first line like"),
        ("// RUN:\nhello\n// ---\n", "expected a first line like"),
        ("", "expected a first line like"),
        ("// RUN: shout\n// ---\nX\n", "there is no input"),
        ("// RUN: shout\na\n// ---\nb\n// ---\n", "expected one line"),
    ],
)
def test_malformed_files_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"bad.ir: {message}"):
        parse(text, "bad.ir")


def test_golden_files_are_sorted(tmp_path: Path) -> None:
    for name in ("b.ir", "a.ir", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in golden_files(tmp_path)] == ["a.ir", "b.ir"]
