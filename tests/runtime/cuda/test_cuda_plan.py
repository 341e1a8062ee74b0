"""Plans, kernels and archives for GPUs are hostile data: a clear ModelError, or a plan within its bounds."""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime import cuda_kernels
from llmc.runtime.cuda_kernels import parse_kernels, read_images
from llmc.runtime.cuda_plan import CudaPlan, parse_cuda_plan
from llmc.runtime.document import Field
from llmc.runtime.errors import ModelError
from tests.runtime.cuda.packages import archive, images, kernels, plan
from tests.runtime.test_readers import VALUES, changed, places

WEIGHTS = 8192
KERNELS = parse_kernels(Field(kernels(), "kernels.json"))


def parse(document: Any) -> CudaPlan:
    return parse_cuda_plan(Field(document, "plan.json"), WEIGHTS, KERNELS)


def check(read: CudaPlan) -> None:
    """Everything in a plan is within its bounds."""
    sizes = {"arena": read.arena_bytes, "param": WEIGHTS}
    for buffer in read.buffers:
        assert buffer.kind not in sizes or 0 <= buffer.offset <= buffer.offset + buffer.bytes <= sizes[buffer.kind]
        assert buffer.offset % 64 == 0 and buffer.index in range(max(1, len(read.states)))
    for entry in read.entries.values():
        assert 1 <= entry.tokens[0] <= entry.tokens[1] <= read.limits.tokens
        for tokens in (1, entry.tokens[1]):
            assert entry.bucket(tokens).tokens >= tokens
        for launch in (launch for bucket in entry.buckets for launch in bucket.launches):
            assert len(launch.args) == KERNELS[read.kernels[launch.kernel]].arguments
            assert all(arg in range(len(read.buffers)) for arg in launch.args)
            assert all(1 <= x < 1 << 31 for x in launch.grid) and max(launch.grid[1:]) < 1 << 16


def test_a_plan() -> None:
    read = parse(plan())
    check(read)
    assert read.samples
    assert [read.entries["decode"].bucket(n).tokens for n in (1, 2, 3, 4)] == [1, 2, 4, 4]
    assert [read.entries["prefill"].bucket(n).tokens for n in (1, 16, 17, 32)] == [16, 16, 32, 32]


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_a_plan_with_anything_in_it(data: st.DataObject) -> None:
    document = plan()
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(document)))
        document = changed(document, place, data.draw(VALUES), data.draw(st.booleans()))
    try:
        check(parse(document))
    except ModelError as error:
        assert str(error).startswith("plan.json")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_kernels_with_anything_in_them(data: st.DataObject) -> None:
    document = kernels()
    place = data.draw(st.sampled_from(places(document)))
    document = changed(document, place, data.draw(VALUES), data.draw(st.booleans()))
    if data.draw(st.booleans()):
        document[data.draw(st.text(max_size=4))] = document.get("mix")
    try:
        read = parse_kernels(Field(document, "kernels.json"))
    except ModelError as error:
        assert str(error).startswith("kernels.json")
        return
    for symbol, kernel in read.items():
        assert symbol == kernel.symbol and symbol.isascii() and "/" not in symbol
        assert kernel.threads in range(32, 1025, 32) and 0 <= kernel.arguments <= 64


def at(*keys: Any) -> Callable[[Any, Any], Any]:
    return lambda document, value: changed(document, keys, value, remove=False)


LAUNCH = ("entries", "decode", "buckets", 0, "launches", 0)
WRONG: dict[str, tuple[Callable[[Any, Any], Any], Any, str]] = {
    "grid": (at(*LAUNCH, "grid"), [1, 1 << 16, 1], "grid[1]: expected an integer from 1 to 65535, found 65536"),
    "an empty grid": (at(*LAUNCH, "grid"), [0, 1, 1], "grid[0]: expected an integer from 1 to 2147483647, found 0"),
    "too few arguments": (at(*LAUNCH, "args"), [0, 1], "args: expected a list of 4 values"),
    "no such buffer": (at(*LAUNCH, "args"), [0, 1, 2, 99], "args[3]: expected an integer from 0 to 17, found 99"),
    "no such kernel": (at("kernels", 2), "nothing", "kernels[2]: expected a kernel that the resources list"),
    "no bucket": (at("entries", "decode", "buckets"), [], "buckets: expected from 1 to 256 buckets"),
    "order": (at("entries", "decode", "buckets", 0, "tokens"), 2, "expected buckets of more and more tokens, up to 4"),
    "too small": (at("entries", "prefill", "buckets", 1, "tokens"), 31, "more and more tokens, up to 32 or more"),
    "no output": (at("buffers", 13), {"kind": "dims"}, "expected a launch that writes the output 'greedy'"),
    "kind": (at("buffers", 0, "kind"), "private", "kind: expected one of ['arena', 'param', 'state', 'input', "),
    "input": (at("buffers", 0, "name"), "tokens", "name: expected one of ['token_ids', "),
    "tickets": (at("tickets"), -1, "tickets: expected an integer from 0 to "),
    "workspace": (at("workspace_bytes"), 1 << 60, "workspace_bytes: expected an integer from 0 to "),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_plan_says_what_is_wrong(case: str) -> None:
    change, value, message = WRONG[case]
    with pytest.raises(ModelError) as caught:
        parse(change(plan(), value))
    assert message in str(caught.value)


def test_a_plan_without_draws() -> None:
    """One bucket that does not choose, and the host does."""
    document = copy.deepcopy(plan())
    launch = document["entries"]["decode"]["buckets"][1]["launches"][-1]
    launch["args"][3] = launch["args"][2]
    assert not parse(document).samples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 48}, "threads: expected a multiple of 32, found 48"),
        ({"threads": 2048}, "threads: expected an integer from 32 to 1024"),
        ({"shared": -1}, "shared: expected an integer"),
        ({"arguments": 65}, "arguments: expected an integer from 0 to 64"),
        ({"function": "a b"}, "function: expected a name of letters, digits and underscores"),
        ({"dependent": 1}, "dependent: expected true or false"),
    ],
)
def test_kernels_say_what_is_wrong(change: dict[str, Any], message: str) -> None:
    document = kernels()
    document["mix"] |= change
    with pytest.raises(ModelError) as caught:
        parse_kernels(Field(document, "kernels.json"))
    assert f"kernels.json: mix.{message}" in str(caught.value)


def test_a_symbol_is_no_path() -> None:
    with pytest.raises(ModelError, match=r"expected a name of letters, digits and underscores, found '\.\./x'"):
        parse_kernels(Field({"../x": kernels()["mix"]}, "kernels.json"))


def read(data: bytes, folder: Path, ptx: bool = False) -> dict[str, bytes]:
    path = folder / "kernels.zip"
    path.write_bytes(data)
    return {kernel.symbol: image for kernel, image in read_images(path, KERNELS, ptx)}


def test_images(tmp_path: Path) -> None:
    files = images()
    assert read(archive(files), tmp_path) == {name: files[f"{name}.cubin"] for name in KERNELS}
    assert read(archive(files), tmp_path, ptx=True) == {name: files[f"{name}.ptx"] for name in KERNELS}


def test_images_that_are_none(tmp_path: Path) -> None:
    for name, data, ptx in (("mix.cubin", b"ELF", False), ("mix.ptx", b"text", True), ("mix.ptx", b".version\0", True)):
        with pytest.raises(ModelError, match=f"{name} is no {name[4:]}; the package is damaged"):
            read(archive({**images(), name: data}), tmp_path, ptx)
    with pytest.raises(ModelError, match=r"cannot read .*no-such\.zip: No such file"):
        list(read_images(tmp_path / "no-such.zip", KERNELS, ptx=False))


def test_an_archive_that_swells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swollen = archive({**images(), "mix.cubin": b"\x7fELF" + bytes(1 << 20)})
    assert len(swollen) < 1 << 13
    monkeypatch.setattr(cuda_kernels, "_MAX_IMAGE", 1 << 19)
    with pytest.raises(ModelError, match=r"mix.cubin has more than 524288 bytes"):
        read(swollen, tmp_path)
    monkeypatch.setattr(cuda_kernels, "_MAX_IMAGE", 1 << 21)
    monkeypatch.setattr(cuda_kernels, "_MAX_IMAGES", 1 << 19)
    with pytest.raises(ModelError, match=r"kernels.zip unpacks to more than 524288 bytes"):
        read(swollen, tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_an_archive_of_anything(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = bytearray(archive(images()))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(bytes(whole[: data.draw(st.integers(0, len(whole)))]), tmp_path_factory.getbasetemp())
    except ModelError as error:
        assert "kernels.zip" in str(error)
        return
    assert set(found) == set(KERNELS) and all(image.startswith(b"\x7fELF") for image in found.values())


def test_other_compressions_are_refused(tmp_path: Path) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_LZMA) as target:
        for name, content in images().items():
            target.writestr(name, content)
    with pytest.raises(ModelError, match="is neither stored nor deflated"):
        read(data.getvalue(), tmp_path)
