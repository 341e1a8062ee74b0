"""The safetensors reader: against the safetensors package, against malformed files, and against random bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from llmc.importers.json_file import ImportFailure
from llmc.importers.safetensors import SafetensorsFile, open_folder
from llmc.ir.errors import LlmcError

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.uint8, np.bool_]
)
def test_reads_what_the_package_writes(tmp_path: Path, dtype: Any) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "a.weight": (draw.standard_normal((3, 5)) * 9).astype(dtype),
        "b": (draw.standard_normal(7) * 9).astype(dtype),
        "scalar": np.array(3).astype(dtype),
        "empty": np.zeros((0, 4), dtype),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        given_back = read[name].load()
        assert given_back.dtype == array.dtype and given_back.shape == array.shape
        assert given_back.tobytes() == array.tobytes()
        assert not given_back.flags.writeable or given_back.base is None


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32)
    text = json.dumps({"x": {**ENTRY, "shape": [6]}}).encode()
    path = write(tmp_path / "x", text + b" " * (3 - (8 + len(text)) % 4), array.tobytes())
    assert (SafetensorsFile(path)["x"].load() == array).all()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "no valid JSON"),
        (b"\xff\xfe", b"", "no valid JSON"),
        (b"[]", b"", "must hold a JSON object, given list"),
        (b'{"x": ' + b"[" * 100_000, b"", "no valid JSON"),
        (b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}", b"", "nested more than 64"),
        (b'{"x": {}, "x": {}}', b"", "the key 'x' stands twice"),
        ({"x": 3}, b"", "an entry has dtype, shape and data_offsets"),
        ({"x": {**ENTRY, "more": 1}}, bytes(24), "an entry has dtype, shape and data_offsets"),
        ({"x": {**ENTRY, "dtype": "F31"}}, bytes(24), "the dtype 'F31' is unknown"),
        ({"x": {**ENTRY, "dtype": ["F32"]}}, bytes(24), "is unknown"),
        ({"x": {**ENTRY, "shape": [2, -3]}}, bytes(24), "the shape must be"),
        ({"x": {**ENTRY, "shape": [2, 3.0]}}, bytes(24), "the shape must be"),
        ({"x": {**ENTRY, "shape": [True, 6]}}, bytes(24), "the shape must be"),
        ({"x": {**ENTRY, "shape": [1] * 40}}, bytes(24), "the shape must be"),
        ({"x": {**ENTRY, "shape": "23"}}, bytes(24), "the shape must be"),
        ({"x": {**ENTRY, "shape": [2, 4]}}, bytes(24), "takes 32 bytes, its data_offsets give 24"),
        ({"x": {**ENTRY, "shape": [1 << 62, 1 << 62, 1 << 62]}}, bytes(24), "its data_offsets give 24"),
        ({"x": {**ENTRY, "data_offsets": [0, 1 << 62]}}, bytes(24), "it is truncated"),
        ({"x": {**ENTRY, "data_offsets": [24, 0]}}, bytes(24), "it is truncated"),
        ({"x": {**ENTRY, "data_offsets": [-24, 0]}}, bytes(24), "must be two positions"),
        ({"x": {**ENTRY, "data_offsets": [0]}}, bytes(24), "must be two positions"),
        ({"x": ENTRY}, bytes(23), "it is truncated"),
        ({"x": ENTRY}, bytes(25), "1 bytes follow the last tensor"),
        ({"x": ENTRY, "y": ENTRY}, bytes(24), "overlaps 'x'"),
        ({"x": ENTRY, "y": {**ENTRY, "data_offsets": [20, 44]}}, bytes(44), "overlaps 'x'"),
        ({"x": ENTRY, "y": {**ENTRY, "data_offsets": [28, 52]}}, bytes(52), "leaves a gap after 'x'"),
        ({"x": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, bytes(1), "takes 1.5 bytes"),
    ],
)
def test_malformed_headers(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(ImportFailure, match=message) as caught:
        SafetensorsFile(write(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [25, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_the_header_length_is_not_trusted(tmp_path: Path, length: int) -> None:
    with pytest.raises(ImportFailure, match="truncated or no safetensors file"):
        SafetensorsFile(write(tmp_path / "x", b"{}", bytes(16), length=length))


@pytest.mark.parametrize("size", [0, 7])
def test_no_room_for_a_header(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with pytest.raises(ImportFailure, match="truncated"):
        SafetensorsFile(tmp_path / "x")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ImportFailure, match="no regular file"):
        SafetensorsFile(tmp_path)
    with pytest.raises(ImportFailure, match="cannot read"):
        SafetensorsFile(tmp_path / "missing")


def shard(folder: Path, name: str, *tensors: str) -> None:
    save_file({t: np.zeros(2, np.float32) for t in tensors}, folder / name)


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    shard(tmp_path, "1.safetensors", "a", "b")
    shard(tmp_path, "2.safetensors", "c")
    index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"})
    assert set(open_folder(tmp_path)) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "must be an object"),
        ([], "must be an object"),
        ({"a": 3}, "must be the name of a file beside the index"),
        ({"a": "../1.safetensors"}, "must be the name of a file beside the index"),
        ({"a": "/etc/passwd"}, "must be the name of a file beside the index"),
        ({"a": ".."}, "must be the name of a file beside the index"),
        ({"a": "x\0y"}, "must be the name of a file beside the index"),
        ({"a": "\ud800"}, "cannot read"),
        ({"a": "3.safetensors"}, "cannot read"),
        ({"a": "1.safetensors"}, "has the tensor 'b', which .* does not place there"),
        ({"a": "1.safetensors", "b": "1.safetensors", "z": "1.safetensors"}, "places the tensor 'z' in 1.safetensors"),
        ({"a": "1.safetensors", "b": "2.safetensors"}, "has the tensor 'b', which .* does not place there"),
    ],
)
def test_wrong_index(tmp_path: Path, weight_map: object, message: str) -> None:
    shard(tmp_path, "1.safetensors", "a", "b")
    shard(tmp_path, "2.safetensors", "b")
    index(tmp_path, weight_map)
    with pytest.raises(ImportFailure, match=message):
        open_folder(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ImportFailure, match=r"neither model.safetensors.*\(other weights: pytorch_model.bin\)"):
        open_folder(tmp_path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "F4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
small = st.integers(-2, 40)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "F4", "I64", "BOOL", "?"]) | json_values,
        "shape": st.lists(small, max_size=3) | json_values,
        "data_offsets": st.lists(small, min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), entries | json_values, max_size=4)


@given(
    data=st.binary(max_size=64) | st.builds(lambda h, d: (json.dumps(h).encode(), d), headers, st.binary(max_size=48))
)
def test_nothing_but_our_error_escapes(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        write(path, *data)
    try:
        tensors = SafetensorsFile(path)
    except LlmcError as error:
        assert str(error)
        return
    total = sum(len(t.data) for t in tensors.values())
    assert total <= path.stat().st_size


@given(
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 60)
)
def test_a_damaged_file(tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], cut: int) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file({"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.float16)}, path)
    data = bytearray(path.read_bytes())
    for place, value in flips:
        data[place % len(data)] = value
    path.write_bytes(bytes(data[: len(data) - cut]))
    try:
        for tensor in SafetensorsFile(path).values():
            assert tensor.load().shape == tensor.shape
    except LlmcError as error:
        assert str(error)
