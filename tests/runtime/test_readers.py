"""manifest.json and plan.json are hostile data: whatever they hold, a clear ModelError or a plan within its bounds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.backends.package import FORMAT_VERSION as WRITTEN_VERSION
from llmc.runtime.document import Field, parse_document
from llmc.runtime.errors import ModelError
from llmc.runtime.manifest import FORMAT_VERSION, read_manifest
from llmc.runtime.plan import FULL, INPUTS, LayerGroup, inputs_of, parse_plan
from tests.runtime.packages import manifest, plan, windowed_plan

WEIGHTS = 8192
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.sampled_from([-1, 0, 1, 63, 64, 1 << 31, 1 << 62, 10**400]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["..", "../x", "/x", "a//b", "a/./b", "\\", "", "x\x00", "\ud800"]),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(document: Any) -> list[tuple[Any, ...]]:
    """The path of every value in a document."""
    children = document.items() if isinstance(document, dict) else enumerate(document)
    found = []
    for key, value in children:
        found.append((key,))
        if isinstance(value, dict | list):
            found += [(key, *rest) for rest in places(value)]
    return found


def changed(document: Any, place: tuple[Any, ...], value: Any, remove: bool) -> Any:
    """A copy of a document with one value replaced or removed."""
    result = copy.deepcopy(document)
    parent = result
    for key in place[:-1]:
        parent = parent[key]
    if remove:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return result


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_a_plan_with_anything_in_it(data: st.DataObject) -> None:
    document = plan()
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(document)))
        document = changed(document, place, data.draw(VALUES), data.draw(st.booleans()))
    try:
        read = parse_plan(Field(document, "plan.json"), WEIGHTS)
    except ModelError as error:
        assert str(error).startswith("plan.json")
        return
    sizes = {"arena": read.arena_bytes, "private": read.private_bytes, "param": WEIGHTS}
    for buffer in read.buffers:
        assert buffer.kind not in sizes or 0 <= buffer.offset <= buffer.offset + buffer.bytes <= sizes[buffer.kind]
        assert buffer.offset % 64 == 0 and buffer.index in range(max(1, len(read.states)))
    for entry in read.entries.values():
        assert 1 <= entry.tokens[0] <= entry.tokens[1] <= read.limits.tokens
        for launch in entry.launches:
            assert launch.kernel in range(len(read.kernels))
            assert all(arg in range(len(read.buffers)) for arg in launch.args)
            kinds = {read.buffers[arg].kind for arg in launch.args}
            assert not launch.each or ("private" in kinds and not kinds & {"state", "output"})


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_manifest_with_anything_in_it(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = {"sha256": "0" * 64, "bytes": 1}
    document = {**manifest("x"), "files": {"kernels-any.so": file, "weights.bin": dict(file), "plan.json": dict(file)}}
    place = data.draw(st.sampled_from(places(document)))
    document = changed(document, place, data.draw(VALUES), data.draw(st.booleans()))
    folder = tmp_path_factory.getbasetemp()
    (folder / "manifest.json").write_text(json.dumps(document))
    try:
        read = read_manifest(folder)
    except ModelError as error:
        assert "manifest.json" in str(error)
        return
    assert all(v.weights in read.files and v.kernels in read.files for v in read.variants)
    assert all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in read.files)


@settings(max_examples=300)
@given(st.binary(max_size=40) | st.text(alphabet='{}[]",:0123456789eE-.NaInfty \\u', max_size=40).map(str.encode))
def test_bytes_that_are_anything(data: bytes) -> None:
    try:
        assert isinstance(parse_document(data, "x.json").object(), dict)
    except ModelError as error:
        assert str(error).startswith("x.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1, "a": 2}', "an object has a key twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": Infinity}', "Infinity is no JSON number"),
        (b"\xff", "is no JSON"),
        (b"[1]", "expected an object"),
        (b'{"a":' + b"[" * 100_000, "is no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is no JSON"),
    ],
)
def test_json_that_is_not_strict(data: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        parse_document(data, "x.json")


def test_messages_name_file_place_and_expectation() -> None:
    document = plan()
    document["buffers"][7]["offset"] = 1 << 40
    with pytest.raises(ModelError) as caught:
        parse_plan(Field(document, "plan.json"), WEIGHTS)
    assert str(caught.value) == (
        "plan.json: buffers[7].offset: expected an integer from 0 to 1536, found 1099511627776; "
        "the package is damaged, compile it again"
    )


@pytest.mark.parametrize("entry", ["decode", "prefill"])
def test_an_entry_that_is_missing(entry: str) -> None:
    document = plan()
    del document["entries"][entry]
    with pytest.raises(ModelError, match=f"an entry point '{entry}'"):
        parse_plan(Field(document, "plan.json"), WEIGHTS)


EACH: dict[str, tuple[int, dict[str, Any], str]] = {
    "nothing private": (0, {"args": [0, 9]}, "each: expected false for a launch that names a state, an output, or no"),
    "a state": (0, {"args": [0, 6, 12]}, "each: expected false for a launch that names a state, an output, or no"),
    "an output": (0, {"args": [0, 10, 12]}, "each: expected false for a launch that names a state, an output, or no"),
    "filled by a share": (0, {"each": False}, "args: expected private buffers that a launch with 'each' has filled"),
    "no boolean": (0, {"each": 1}, "each: expected true or false, found 1"),
}


@pytest.mark.parametrize("wrong", EACH)
def test_an_each_launch_that_is_not_sound(wrong: str) -> None:
    at, changes, message = EACH[wrong]
    document = plan()
    document["entries"]["decode"]["launches"][at].update(changes)
    with pytest.raises(ModelError) as caught:
        parse_plan(Field(document, "plan.json"), WEIGHTS)
    assert f"plan.json: entries.decode.launches[{at}].{message}" in str(caught.value)


def test_a_private_buffer_outside_its_region() -> None:
    document = plan()
    document["private_bytes"] = 64
    with pytest.raises(ModelError, match=r"buffers\[12\].bytes: expected an integer from 0 to 0"):
        parse_plan(Field(document, "plan.json"), WEIGHTS)


def test_a_plan_of_format_version_2() -> None:
    """All layers are one group, which sees everything."""
    document = plan()
    del document["groups"], document["states"][0]["group"]
    read = parse_plan(Field(document, "plan.json"), WEIGHTS)
    assert read.groups == (FULL,) and [state.group for state in read.states] == [0]


def test_groups_of_layers() -> None:
    read = parse_plan(Field(windowed_plan(), "plan.json"), WEIGHTS)
    assert read.groups == (FULL, LayerGroup("window_6", 6)) and [state.group for state in read.states] == [0, 1]
    assert inputs_of(read.groups)[-2:] == ("slot_mapping_window_6", "block_tables_window_6")
    assert inputs_of(read.groups[1:]) == INPUTS, "the first group's have no name behind them"


GROUPS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "none": (
        lambda d: d.update(groups=[]),
        r"groups: expected from 1 to 64 groups of layers, each with another window",
    ),
    "twice": (lambda d: d["groups"].append(d["groups"][1]), r"groups: expected from 1 to 64 groups"),
    "too many": (
        lambda d: d.update(groups=[{"name": f"window_{i}", "window": i} for i in range(1, 66)]),
        r"groups: expected from 1 to 64 groups",
    ),
    "another name": (
        lambda d: d["groups"][1].update(name="window_7"),
        r"groups\[1\].name: expected 'window_6', as its",
    ),
    "a path": (
        lambda d: d["groups"][0].update(name="../full"),
        r"groups\[0\].name: expected 'full', as its window is 0",
    ),
    "negative": (lambda d: d["groups"][1].update(window=-6), r"groups\[1\].window: expected an integer from 0 to"),
    "endless": (lambda d: d["groups"][1].update(window=1 << 40), r"groups\[1\].window: expected an integer from 0 to"),
    "no number": (lambda d: d["groups"][1].update(window="6"), r"groups\[1\].window: expected an integer"),
    "a state's": (lambda d: d["states"][1].update(group=2), r"states\[1\].group: expected an integer from 0 to 1"),
    "an input's": (
        lambda d: d["buffers"][14].update(name="block_tables_window_7"),
        r"buffers\[14\].name: expected one of",
    ),
}


@pytest.mark.parametrize("wrong", GROUPS)
def test_groups_that_are_not_sound(wrong: str) -> None:
    change, message = GROUPS[wrong]
    document = windowed_plan()
    change(document)
    with pytest.raises(ModelError, match=rf"plan\.json: {message}"):
        parse_plan(Field(document, "plan.json"), WEIGHTS)


def test_a_manifest_of_the_format_before(tmp_path: Path) -> None:
    file = {"sha256": "0" * 64, "bytes": 1}
    files = {"kernels-any.so": file, "weights.bin": file}
    assert manifest("x")["format_version"] == FORMAT_VERSION == WRITTEN_VERSION == 3
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest("x"), "format_version": 2, "files": files}))
    assert read_manifest(tmp_path).name == "x"


def test_an_output_that_nothing_writes() -> None:
    document = plan()
    document["entries"]["decode"]["launches"].pop()
    with pytest.raises(ModelError, match="a launch that writes the output 'logits'"):
        parse_plan(Field(document, "plan.json"), WEIGHTS)
