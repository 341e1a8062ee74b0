"""Descriptions: a user's own family, what can be wrong in one, and the arithmetic in it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from llmc.architectures.fill import DescriptionError
from llmc.architectures.loader import parse_description
from llmc.architectures.settings import ConfigurationError, evaluate
from llmc.importers.hf import import_model
from llmc.ir.errors import LlmcError

MINE = """
model_types = ["mine"]
embedding.name = "tok"
positions = { kind = "none" }
final_norm = { kind = "layer_norm", name = "norm" }
head = { name = "out", bias = true }

[config]
vocab_size = "words"
hidden_size = "width"
num_layers = { key = "depth", default = 1 }
num_heads = "heads"
max_positions = { key = "length", default = 16 }
norm_eps = { key = "eps", default = 1e-5 }
activation = { key = "act", default = "relu" }

[layer]
kind = "sequential"
name = "block.{layer}"
attention_norm = { kind = "rms_norm", name = "n1" }
mlp_norm = { kind = "rms_norm", name = "n2" }
mlp = { kind = "plain", name = "ff", up = "a", down = "b", intermediate_size = "(hidden_size + 2) * 3 // 2" }

[layer.attention]
kind = "fused"
name = "att"
qkv = "in"
output = "out"
num_kv_heads = 1
head_dim = "hidden_size / num_heads"
"""
CONFIG = {"model_type": "mine", "words": 11, "width": 12, "heads": 3}


def run(folder: Path, toml: str, **changes: Any) -> Any:
    toml = toml.replace("max_positions", "max_positions")
    (folder / "mine.toml").write_text(toml)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return import_model(folder, architecture=folder / "mine.toml", random_weights=True)


def complete(toml: str = MINE) -> str:
    return toml.replace("[layer]", 'tie_word_embeddings = { key = "tied", default = false }\n\n[layer]')


def test_a_description_of_ones_own(tmp_path: Path) -> None:
    model = run(tmp_path, complete())
    shapes = {label: source.shape for label, source in model.weights.items()}
    assert shapes["block.0.att.in.weight"] == (20, 12)
    assert shapes["block.0.ff.a.weight"] == (21, 12)
    assert shapes["out.bias"] == (11,)
    assert model.info.architecture == "mine"
    assert {n.loc for n in model.graph.nodes} >= {"tok", "block.0.att.out", "norm", "out"}


def test_descriptions_are_short_and_complete() -> None:
    for file in resources.files("llmc.architectures").iterdir():
        if file.name.endswith(".toml") and file.name != "common.toml":
            lines = file.read_text().splitlines()
            assert len(lines) <= 50 and max(map(len, lines)) <= 120, file.name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('["mine"]', "[]", "must name at least one model type"),
        ('["mine"]', '"mine"', "must be a list of texts"),
        ("[layer]", "[layr]", "no table or key 'layr'; did you mean 'layer'"),
        ('kind = "none"', 'kind = "non"', "positions: there is no kind 'non'; did you mean 'none'"),
        ('kind = "none"', "", "positions: there is no kind ''; known: alibi, learned, none, rotary"),
        ('name = "att"', 'nam = "att"', "there is no field 'nam'; did you mean 'name'"),
        ('name = "att"', "", "the field 'name' is missing, and"),
        ('name = "att"', "name = 3", "layer, attention, name must be text, given 3"),
        ('norm_eps = { key = "eps", default = 1e-5 }', "", "the field 'norm_eps' is missing"),
        ('num_heads = "heads"', 'num_heads = "heads"\nspare = "s"', "no block uses spare"),
        ('num_heads = "heads"', "num_heads = 3", "must be a key's name or"),
        ('num_heads = "heads"', 'num_heads = { key = "heads", defalt = 3 }', "no 'defalt'; did you mean 'default'"),
        ('num_heads = "heads"', 'num_heads = { key = "heads", otherwise = "hed" }', "'num_heads': .* no value 'hed'"),
        ('num_heads = "heads"', 'num_heads = { key = "h", default = "num_layers" }', "'default' is taken as it stands"),
        (
            'num_heads = "heads"',
            'num_heads = "hats"',
            "the key 'hats' is missing, which .config. reads for 'num_heads'",
        ),
        ("num_kv_heads = 1", "num_kv_heads = 'lair'", "layer, attention, num_kv_heads: .* no value 'lair'"),
        (
            "num_kv_heads = 1",
            "num_kv_heads = 1\nlayout = 'group'",
            "attention, layout must be 'parts' or 'groups', given 'group'",
        ),
        (
            "num_kv_heads = 1",
            "num_kv_heads = 1\nqkv_bias = 'num_layers'",
            "must be true or false, given 1; a comparison makes a flag",
        ),
        (
            'head = { name = "out", bias = true }',
            'head = { name = "out", bias = "layer == 0" }',
            "inside .layer. alone",
        ),
        ("block.{layer}", "block.{l}", r"layer, name: 'block.\{l\}' has \{l\}; known: expert, layer"),
        ('num_heads = "heads"', "num_heads = { key = 3 }", "'key' must be text"),
        ('num_heads = "heads"', 'num_heads = { key = "h", otherwise = "num_heads" }', "defines 'num_heads' by itself"),
        ('num_heads = "heads"', 'num_heads = { key = "h", default = { a = 3 } }', "'default' must be a number"),
        ("hidden_size / num_heads", "hidden_size / heads", "names no value 'heads'; did you mean 'num_heads'"),
        ("hidden_size / num_heads", "hidden_size @ 2", r"may use names, numbers, .* `a if condition else b`"),
        ("hidden_size / num_heads", "__import__('os')", "may use names, numbers"),
        ("hidden_size / num_heads", "hidden_size +", "is no expression"),
        ("hidden_size / num_heads", "activation * 2", "'activation' must be a number"),
        ("mlp_norm =", "mlp_nor =", "there is no field 'mlp_nor'"),
        ('head = { name = "out", bias = true }', "head = 3", "head must be a table such as { name"),
        ('head = { name = "out", bias = true }', "", "the table 'head' is missing"),
        ('head = { name = "out", bias = true }', 'neutral.x = 3\nhead.name = "out"', "must be a list of the values"),
        ("[config]", "[config", "is no TOML"),
    ],
)
def test_wrong_descriptions(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in complete()
    with pytest.raises(LlmcError, match=message):
        run(tmp_path, complete().replace(old, new, 1))


def test_unreadable_descriptions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(DescriptionError, match="cannot read the description"):
        import_model(tmp_path, architecture=tmp_path / "none.toml", random_weights=True)
    with pytest.raises(DescriptionError, match="at most"):
        parse_description(b" " * (1 << 21), "big.toml")
    with pytest.raises(DescriptionError, match="is no TOML"):
        parse_description(b"\xff", "x.toml")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("a", 12),
        ("flag", True),
        ("a / 4", 3),
        ("a // 5", 2),
        ("half / 2", 0.25),
        ("2 * (a - 3) + 1", 19),
        ("a * half", 6.0),
        ("a ** half", 12**0.5),
        ("a * 0.3 // 1", 3),
        ("-a % 5", 3),
        ("a if flag else nothing", 12),
        ("a if not flag else half", 0.5),
        ("'far' if a < 3 or a >= 13 else 'near'", "near"),
        ("flag and a == 12 and 'x' != 'y'", True),
        ("a in places", True),
        ("a not in places", False),
    ],
)
def test_arithmetic(expression: str, value: object) -> None:
    names = {"a": 12, "half": 0.5, "flag": True, "places": [3, 12]}
    assert evaluate(expression, names.__getitem__, "here") == value


@pytest.mark.parametrize(
    "expression",
    ["a.b", "a[0]", "a if a else a", "f(a)", "a < 'x'", "f'{a}'", "-flag", "lambda: a", "[a]", "a % 0", "(" * 300,
     "flag + 1", "a / 5", "a / 0", "half // 0", "huge * half", "x := 3", "", "not a", "a and flag", "a in 3", "a is a",
     "1 < a < 3", "huge ** 2", "a ** 999", "(0 - a) ** half", "a @ a", "a << 2", "~a", "b'x'", "None"],
)  # fmt: skip
def test_nothing_but_arithmetic(expression: str) -> None:
    names = {"a": 12, "half": 0.5, "flag": True, "huge": 10**4000}
    with pytest.raises(ConfigurationError):
        evaluate(expression, names.__getitem__, "here")
