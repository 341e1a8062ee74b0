"""Rules of the house that no other tool checks: no model family below the descriptions, short files, no local paths."""

from __future__ import annotations

import ast
import re

import pytest

from tests.fixtures import REPOSITORY
from tests.sources import repository_files

MAX_LINES = 400
# Files that may be longer, each with the reason.
LONG: dict[str, str] = {}

ANYWHERE = (
    r"llama|mistral|mixtral|qwen|gemma|falcon|bloom|starcoder|deepseek|internlm|baichuan|stablelm|chatglm|minicpm"
    r"|nemotron|smollm|exaone|pythia|mamba|jamba|rwkv|whisper|gpt[-_]?(?:2|j|oss)|neox|cohere|olmo|hunyuan|roberta|dbrx|granite|ministral|tinyllama"
)
AS_A_WORD = r"bert|bart|t5|mpt|phi[-_]?[1-4]|glm|grok|yi"
FAMILY = re.compile(rf"{ANYWHERE}|(?<![a-z0-9])(?:{AS_A_WORD})(?![a-z0-9])", re.IGNORECASE)
# Projects that sources are cited by: names of programs, not of models.
CITED = re.compile(r"llama\.cpp|llama2\.c", re.IGNORECASE)
FAMILY_FREE = ("ir/", "passes/", "backends/", "templates/", "llmc/runtime/", "llmc/architectures/")

LOCAL_PATH = re.compile(r"(?:^|[\s\"'`(=:])/(?:work|farm|root|home|tmp|Users)/")

CODE = (".py", ".c", ".h", ".jinja")
TEXT = (*CODE, ".toml", ".md", ".ir", "Makefile", ".ci/run")


def files(suffixes: tuple[str, ...], under: tuple[str, ...] = ("",)) -> dict[str, str]:
    """Path -> text of the repository's own files."""
    return {
        name: (REPOSITORY / name).read_text(encoding="utf-8")
        for name in repository_files()
        if name.endswith(suffixes) and name.startswith(under) and not (REPOSITORY / name).is_symlink()
    }


def family(line: str) -> str | None:
    """The model family that a line names, if any."""
    found = FAMILY.search(CITED.sub("", line))
    return found[0] if found else None


def test_no_model_family_is_named() -> None:
    sources = files(CODE, FAMILY_FREE)
    assert "ir/op.py" in sources
    found = [
        f"{name}:{number} names {named!r}"
        for name, text in sources.items()
        for number, line in enumerate(text.splitlines(), 1)
        if (named := family(line))
    ]
    assert not found, "families live in llmc/architectures/*.toml:\n" + "\n".join(found)


def test_files_are_short() -> None:
    long = {name: text.count("\n") for name, text in files(CODE).items() if text.count("\n") > MAX_LINES}
    assert long.keys() == LONG.keys(), f"more than {MAX_LINES} lines is more than one responsibility: {long}"


def test_no_path_of_one_machine() -> None:
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in files(TEXT).items()
        for number, line in enumerate(text.splitlines(), 1)
        if LOCAL_PATH.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_runtime_parses_on_python_3_10() -> None:
    sources = files((".py",), ("llmc/runtime/",))
    assert "llmc/runtime/__init__.py" in sources
    for name, text in sources.items():
        ast.parse(text, filename=name, feature_version=(3, 10))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("# as GPT-2 does", "GPT-2"),
        ("class LlamaMLP:", "Llama"),
        ("if arch == 't5':", "t5"),
        ("x = albert_t5x", None),
        ("# Source: llama.cpp, ggml-quants.c", None),
        ("phi = np.exp(-x)", None),
    ],
)
def test_the_family_pattern(line: str, named: str | None) -> None:
    assert family(line) == named


@pytest.mark.parametrize(
    ("line", "local"),
    [
        ("cd /" + "root/x", True),
        ("open('/" + "tmp/x')", True),
        ("https://example.org/home/x", False),
        ("tests/work/x", False),
    ],
)
def test_the_path_pattern(line: str, local: bool) -> None:
    assert bool(LOCAL_PATH.search(line)) is local
