"""Encoding as transformers does it; and text piece by piece, equal to the whole text decoded at once."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.errors import ModelError
from llmc.runtime.tokenizer import REPLACEMENT, Detokenizer, Tokenizer, load_tokenizer
from tests.fixtures import fixture_path

FILES = {
    "byte-level": "models/picocode/tokenizer.json",
    "characters": "models/babyllama-tok105/hf/tokenizer.json",
    "byte-fallback": "models/stories260K/hf/tokenizer.json",
    "byte-fallback, large": "tokenizers/llama2/tokenizer.json",
    "byte-level, added tokens": "tokenizers/codegen-phi2/tokenizer.json",
    "byte-level, normalized": "tokenizers/gpt-neox-20b/tokenizer.json",
    "byte-level, many special tokens": "tokenizers/whisper/tokenizer.json",
}
TEXTS = [
    "def fibonacci(n):\n",
    "Once upon a time, there was a little girl.",
    "  two spaces,  and two more\n\n\ttab ",
    "naïve café – “quotes” … 東京 한국어 ไทย 👩‍👩‍👧‍👦🇫🇷 \u200b\ufeff e\u0301",
    "<s> </s> <unk> <0x0A> <|endoftext|>",
    "�\ufffd a",
    " ",
    "\n",
    "",
]


@cache
def tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(fixture_path(FILES[name]), None, False)


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150)
@given(st.data())
def test_pieces_are_the_whole_text(name: str, data: st.DataObject) -> None:
    """Any ids at all: half characters, invalid bytes, special and unknown tokens."""
    t = tokenizer(name)
    awkward = [*sorted(t.byte_ids), *sorted(t.special_ids), t.vocab_size + 3]
    ids = data.draw(st.lists(st.integers(0, t.vocab_size - 1) | st.sampled_from(awkward), max_size=24))
    pieces = stream(t, [], ids)
    assert "".join(pieces) == t.decode(ids)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=150)
@given(st.data())
def test_a_completion_continues_its_prompt(name: str, data: st.DataObject) -> None:
    t = tokenizer(name)
    prompt = t.encode(data.draw(st.sampled_from(TEXTS[:4]) | st.text(min_size=1, max_size=12)))
    rest = t.encode(data.draw(st.sampled_from(TEXTS) | st.text(max_size=12)), add_special_tokens=False)
    before, whole = t.decode(prompt), t.decode(prompt + rest)
    if whole.startswith(before):
        assert "".join(stream(t, prompt, rest)) == whole[len(before) :]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_ends_within_a_character(name: str, text: str) -> None:
    t = tokenizer(name)
    if REPLACEMENT in text or REPLACEMENT in t.decode(t.encode(text)):
        return  # the text, or a vocabulary without bytes, has replacement characters of its own
    assert not any(REPLACEMENT in piece for piece in stream(t, [], t.encode(text)))


def test_a_character_of_four_bytes_comes_at_once() -> None:
    t = tokenizer("byte-level")
    ids = t.encode("👩", add_special_tokens=False)
    assert len(ids) > 1
    assert stream(t, [], ids) == [*[""] * (len(ids) - 1), "👩", ""]


def test_the_space_after_the_prompt_is_kept() -> None:
    t = tokenizer("byte-fallback")
    prompt, rest = t.encode("The cat"), t.encode("was red", add_special_tokens=False)
    assert t.decode(rest) == "was red"
    assert "".join(stream(t, prompt, rest)) == " was red"


def test_long_text_of_split_characters_stays_linear() -> None:
    """Each decode looks at a window: its length does not grow with the text."""
    t = tokenizer("byte-level")
    ids = t.encode("👩🏽" * 300, add_special_tokens=False)
    detokenizer, longest = Detokenizer(t, t.encode("x")), 0
    for i in ids:
        detokenizer.push(i)
        longest = max(longest, len(detokenizer._anchor) + len(detokenizer._pending))
    assert longest < 20


MODELS = ("picocode", "stories260K/hf", "babyllama-tok105/hf")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_prompts_are_encoded_as_transformers_does(
    model: str, post_processor: bool, add_bos_token: bool, tmp_path: Path
) -> None:
    """The file's post-processor decides, whatever the configuration states."""
    transformers = pytest.importorskip("transformers")
    folder = fixture_path(f"models/{model}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    file = json.loads((folder / "tokenizer.json").read_text())
    if not post_processor:
        file["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": add_bos_token}))
    judge = transformers.AutoTokenizer.from_pretrained(tmp_path)
    t = load_tokenizer(tmp_path / "tokenizer.json", judge.bos_token_id, False)
    for text in TEXTS:
        assert t.encode(text) == judge(text).input_ids
        assert t.encode(text, add_special_tokens=False) == judge(text, add_special_tokens=False).input_ids
        ids = t.encode(text)
        assert t.decode(ids) == judge.decode(ids, skip_special_tokens=True)
    assert t.adds_bos == post_processor


def test_goldens_are_encoded_as_recorded() -> None:
    for model in MODELS:
        folder = fixture_path(f"models/{model}")
        golden = json.loads((fixture_path(f"models/{model.split('/')[0]}") / "golden.json").read_text())
        t = load_tokenizer(folder / "tokenizer.json", 1, False)
        for case in golden["cases"]:
            assert t.encode(case["prompt"]) == case["prompt_ids"]


def test_a_beginning_token_that_the_file_does_not_add() -> None:
    path = fixture_path(FILES["byte-level, normalized"])
    plain, added = load_tokenizer(path, 0, False), load_tokenizer(path, 0, True)
    assert not plain.adds_bos and added.adds_bos
    assert added.encode("a b") == [0, *plain.encode("a b")]
    assert added.encode("a b", add_special_tokens=False) == plain.encode("a b")


def test_mistakes_are_named(tmp_path: Path) -> None:
    t = tokenizer("byte-level")
    with pytest.raises(ValueError, match="given bytes, expected str"):
        t.encode(b"x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="character 1 is half a surrogate pair"):
        t.encode("a\ud800")
    with pytest.raises(ValueError, match="given -1"):
        t.decode([-1])
    for content in ("", "{", "{}", '{"model": {"type": "BPE"}}', "[]"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path / "tokenizer.json", None, False)
