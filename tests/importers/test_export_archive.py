"""Damaged and hostile torch.export archives: one clear error each, whatever the bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.importers.choose import import_model
from llmc.ir.errors import LlmcError
from llmc.ir.verify import verify
from tests.importers import handwritten
from tests.importers.exports import Exported, changed, edited, export

torch = pytest.importorskip("torch")

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"


def first_entry(**changes: Any) -> Callable[[Any], None]:
    def edit(table: Any) -> None:
        entry = next(iter(table["config"].values()))
        entry.update({k: v for k, v in changes.items() if k in entry})
        entry["tensor_meta"].update({k: v for k, v in changes.items() if k not in entry})

    return edit


def first_node(**changes: Any) -> Callable[[Any], None]:
    return lambda program: program["graph_module"]["graph"]["nodes"][1].update(changes)


def remove(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        del members[name]

    return change


def _as(size: int) -> dict[str, int]:
    return {"as_int": size}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            edited(WEIGHTS, first_entry(use_pickle=True)),
            r"stored as a pickle, which can run any code and is never read",
        ),
        (edited(WEIGHTS, first_entry(dtype=9)), r"the element type 9 is not supported; known: .*7 \(f32\)"),
        (edited(WEIGHTS, first_entry(dtype=5)), r"takes \d+ bytes, its member has"),
        (
            edited(WEIGHTS, first_entry(sizes=[_as(3), _as(4)])),
            r"is stored as \[3, 4\], the program wants \[1021, 60\]",
        ),
        (
            edited(WEIGHTS, first_entry(strides=[_as(1 << 50), _as(1)])),
            r"with strides \[1125899906842624, 1\] is absurd",
        ),
        (
            edited(WEIGHTS, first_entry(strides=[_as(0), _as(0)], sizes=[_as(1 << 30), _as(1 << 17)])),
            r"repeats its elem",
        ),
        (edited(WEIGHTS, first_entry(storage_offset=_as(-1))), r"is absurd"),
        (
            edited(WEIGHTS, lambda t: t["config"].popitem()),
            r"lacks the tensor 'lm_head.weight', which the program reads",
        ),
        (edited(WEIGHTS, lambda t: t.update(config=3)), r"'config' must be an object, tensor name -> entry"),
        (edited(WEIGHTS, lambda t: t["config"].update(x={})), r"an entry lacks 'tensor_meta'"),
        (remove("data/weights/weight_3"), r"is damaged: it has no member 'data/weights/weight_3'"),
        (remove(PROGRAM), r"must hold one model, given 0"),
        (remove("archive_format"), r"no archive of torch.export.save: its format is no pt2"),
        (lambda m: m.update(byteorder=b"big"), r"the byte order must be little, given b'big'"),
        (
            edited(PROGRAM, lambda p: p.update(schema_version={"major": 9})),
            r"schema version 9 .* not supported; known: 8",
        ),
        (edited(PROGRAM, lambda p: p.pop("graph_module")), r"does not fit its schema \(KeyError: 'graph_module'\)"),
        (
            edited(PROGRAM, first_node(target="torch.ops.aten.embeding.default")),
            r"embeding.default: .*embedding.default",
        ),
        (
            edited(PROGRAM, first_node(inputs=[])),
            r"node 'embedding' at model.embed_tokens, embedding.default: weight must",
        ),
        (edited(PROGRAM, first_node(outputs=[])), r"it reads 'embedding', which no node before it makes"),
    ],
)
def test_a_damaged_archive_is_one_clear_error(change: Any, message: str, exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(LlmcError, match=message):
        import_model(changed(exported("llama", "eager"), tmp_path / "model.pt2", change))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "model.pt2"
    torch.manual_seed(4)
    return export(handwritten.TriangleModel(1).eval(), path)


@settings(max_examples=60)
@given(data=st.data())
def test_truncated_or_flipped_bytes_never_crash(data: st.DataObject, small: Path, tmp_path_factory: Any) -> None:
    whole = small.read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(0, 3)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "model.pt2"
    path.write_bytes(bytes(damaged))
    try:
        model = import_model(path)
    except LlmcError as error:
        assert "model.pt2" in str(error)
    else:
        assert len(damaged) == len(whole)
        for label in model.weights:
            model.weights.load(label)


STRANGE = (
    "null",
    "true",
    "-1",
    "1180591620717411303424",
    "1.5",
    '"x"',
    "[]",
    "{}",
    "[[]]",
    '{"as_int": -3}',
    '{"as_none": 1}',
)


@settings(max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), depth=st.integers(0, 12), value=st.sampled_from(STRANGE))
def test_a_program_of_nonsense_never_crashes(
    place: float, depth: int, value: str, small: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any value of the program's JSON replaced by another."""

    def edit(program: Any) -> None:
        at, rest = program, place
        for level in range(99):
            keys = (
                [k for k in at if k not in ("metadata", "module_call_graph")]
                if isinstance(at, dict)
                else range(len(at))
            )
            rest *= len(keys)
            key = keys[int(rest)]
            rest %= 1
            if level == depth or not at[key] or not isinstance(at[key], dict | list):
                at[key] = json.loads(value)
                return
            at = at[key]

    path = changed(small, tmp_path_factory.mktemp("nonsense") / "model.pt2", edited(PROGRAM, edit))
    try:
        verify(import_model(path).graph, "primitive")
    except LlmcError as error:
        assert "model.pt2" in str(error)


def test_what_is_no_archive(tmp_path: Path) -> None:
    for content in (b"", b"PK", json.dumps({}).encode()):
        (tmp_path / "model.pt2").write_bytes(content)
        with pytest.raises(LlmcError, match=r"model\.pt2"):
            import_model(tmp_path / "model.pt2")
    with pytest.raises(LlmcError, match=r"model2\.pt2"):
        import_model(tmp_path / "model2.pt2")
