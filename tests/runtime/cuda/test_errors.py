"""What goes wrong with drivers, devices and memory, and what is said about it; nothing is left behind."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmc.runtime import cuda_api
from llmc.runtime.batch import Chunk, build_batch
from llmc.runtime.cuda_load import choose_cuda_variant
from llmc.runtime.engine import as_token_array
from llmc.runtime.errors import ModelError
from llmc.runtime.load import load_model
from llmc.runtime.manifest import Variant
from tests.runtime.cuda.fake import FakeCuda, build_fake_driver
from tests.runtime.cuda.packages import archive, images, manifest
from tests.runtime.packages import write_manifest

Setting = dict[str, str]


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(package, tmp_path / "tiny_gpu_model"))


def error_of(package: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(package, **options)
    return str(caught.value)


def test_there_is_no_driver(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_api, "LIBRARY", str(tmp_path / "libcuda.so.1"))
    message = error_of(package)
    assert message.startswith("no CUDA driver: ") and "libcuda.so.1 cannot be loaded" in message
    assert message.endswith("install their driver, or compile the model for a CPU")


def test_a_driver_without_a_function(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_api, "LIBRARY", str(build_fake_driver(tmp_path, "-DOLD_DRIVER")))
    message = error_of(package)
    assert message.endswith("is too old: it has no cuLaunchKernelEx; install one for CUDA 12.3 or newer")


STARTING: dict[str, tuple[Setting, str | None, str]] = {
    "an old driver": ({"DRIVER": "12020"}, None, "is too old: it is for CUDA 12.2; install one for CUDA 12.3 or newer"),
    "no device": ({"DEVICES": "0"}, None, "no CUDA device: the driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?)"),
    "one device": ({}, "cuda:1", "no device cuda:1: this process sees 1 (cuda:0)"),
    "two devices": ({"DEVICES": "2"}, "cuda:2", "no device cuda:2: this process sees 2 (cuda:0 to cuda:1)"),
    "an older GPU": (
        {"CAPABILITY": "8.6"},
        None,
        "cuda:0 (Fake GPU 0) has compute capability 8.6, and the package holds sm_90: compile it for cuda:sm_86",
    ),
    "starting fails": (
        {"FAIL": "cuInit:1:999"},
        None,
        "starting CUDA: cuInit failed: CUDA_ERROR_FAKE (999): a fake error",
    ),
    "the context": (
        {"FAIL": "cuDevicePrimaryCtxRetain:1:2"},
        None,
        "cuda:0 (Fake GPU 0): a context: cuDevicePrimaryCtxRetain failed: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory",
    ),
    "the stream": ({"FAIL": "cuStreamCreate:1:999"}, None, "the CUDA driver: cuStreamCreate failed"),
    "a module": (
        {"FAIL": "cuModuleLoadData:2:209"},
        None,
        "loading append: cuModuleLoadData failed: CUDA_ERROR_FAKE (209): a fake error; the driver, for CUDA 12.8, does",
    ),
    "memory": (
        {"FAIL": "cuMemAlloc_v2:2:2"},
        None,
        "cuda:0 (Fake GPU 0): out of memory although it was planned: 1073.7 MB of 2147.5 MB are free",
    ),
    "pinned memory": ({"FAIL": "cuMemAllocHost_v2:3:2"}, None, "4292 bytes of pinned memory: cuMemAllocHost_v2 failed"),
    "copying weights": (
        {"FAIL": "cuMemcpyHtoDAsync_v2:1:1"},
        None,
        "a copy of 4292 bytes (to device): a copy failed",
    ),
}


@pytest.mark.parametrize("case", STARTING)
def test_loading_fails(case: str, package: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, device, message = STARTING[case]
    for name, value in settings.items():
        monkeypatch.setenv(f"FAKE_CUDA_{name}", value)
    assert message in error_of(package, device=device)


def test_a_second_device(package: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    with load_model(package, device="cuda:1") as model, load_model(package, device="cuda") as other:
        assert model.info["loaded"]["device"] == "cuda:1 (Fake GPU 1)"
        assert other.info["loaded"]["device"] == "cuda:0 (Fake GPU 0)"
        assert model.generate([1, 2], 4).token_ids == other.generate([1, 2], 4).token_ids


def test_too_little_memory_names_all_numbers(package: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve, fixed = 512 << 20, 4352 + 6144 + 768 + 2048 + 1280 + 256
    monkeypatch.setenv("FAKE_CUDA_FREE", str(reserve + fixed + 159))
    assert error_of(package) == (
        "cuda:0 (Fake GPU 0): not enough memory: 536.9 MB of 2147.5 MB are free, and the model needs weights 0.0 MB, "
        "arena 0.0 MB, workspace 0.0 MB, inputs 0.0 MB, outputs 0.0 MB, reserve 536.9 MB, and 0.0 MB for the keys and "
        "values of one sequence of the longest; free memory on the GPU, or compile with a smaller --quant or "
        "--max-sequence-length"
    )
    assert "cuMemAlloc_v2" not in cuda.calls(), "planned before anything is taken"
    monkeypatch.setenv("FAKE_CUDA_FREE", str(reserve + fixed + 160))
    with load_model(package) as model:
        assert model.info["loaded"]["memory"]["blocks"] == (10,), "one sequence of the longest"


STEPS: dict[str, tuple[str, str]] = {
    "a launch while it is recorded": (
        "cuLaunchKernelEx:4:1",
        "launch of head (grid 2 x 1 x 1, 128 threads, 102400 bytes shared): cuLaunchKernelEx failed: CUDA_ERROR_FAKE",
    ),
    "the graph": ("cuGraphLaunch:1:700", "a step of the model: cuGraphLaunch failed: CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
    "a kernel": (
        "cuStreamSynchronize:1:700",
        "a step of the model: cuStreamSynchronize failed: CUDA_ERROR_ILLEGAL_ADDRESS (700): an illegal memory access",
    ),
    "the recording": ("cuStreamBeginCapture_v2:1:900", "recording a step: cuStreamBeginCapture_v2 failed"),
    "a context": ("cuCtxPushCurrent_v2:2:201", "cuCtxPushCurrent_v2 failed"),
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_fails_and_none_follows(
    case: str, package: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail, message = STEPS[case]
    with load_model(package) as model:
        cuda.reset()
        monkeypatch.setenv("FAKE_CUDA_FAIL", fail)
        with pytest.raises(ModelError) as caught:
            model.generate([1, 2, 3], 4)
        assert message in str(caught.value)
        monkeypatch.delenv("FAKE_CUDA_FAIL")
        before = len(cuda.log())
        with pytest.raises(ModelError) as again:
            model.generate([1], 1)
        assert str(again.value).startswith(
            "cuda:0 (Fake GPU 0) can do no more for this model, as an earlier step failed"
        )
        assert str(caught.value) in str(again.value) and "load the model in a new one" in str(again.value)
        assert len(cuda.log()) == before, "the driver is not asked again"
        cuda.reset()  # what a fault has spoiled is given back by the fake, not by a real driver


def test_memory_for_a_graph_may_come_later(package: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with load_model(package) as model:
        cuda.reset()
        monkeypatch.setenv("FAKE_CUDA_FAIL", "cuGraphInstantiateWithFlags:1:2")
        with pytest.raises(ModelError, match="out of memory although it was planned"):
            model.generate([1, 2, 3], 4)
        monkeypatch.delenv("FAKE_CUDA_FAIL")
        assert len(model.generate([1, 2, 3], 4).token_ids) == 4


def test_a_closed_model(package: Path, cuda: FakeCuda) -> None:
    model = load_model(package)
    sequence = model.sequence()
    output = model._engine.executor
    model.close()
    model.close()
    for use in (lambda: model.generate([1], 1), lambda: sequence.step(1), lambda: output.copy_block(0, 0, 1)):
        with pytest.raises(ModelError, match="the model is closed"):
            use()


def test_a_model_that_is_dropped(package: Path, cuda: FakeCuda) -> None:
    """The fixture finds that everything was given back."""
    load_model(package).generate([1, 2], 3)


def test_logits_must_be_read_before_the_next_step(package: Path, cuda: FakeCuda) -> None:
    with load_model(package) as model, model.sequence() as sequence, sequence.engine.exclusive():
        executor = sequence.engine.executor
        sequence.table.extend(2, executor.copy_block)
        batch = build_batch([Chunk(sequence.table, as_token_array([1, 2]), 1)], executor.block_size)
        first, second = executor.step("prefill", batch), executor.step("prefill", batch)
        assert second.logits.shape == (1, 23)
        with pytest.raises(ModelError, match="these logits are gone: they were of an earlier step"):
            _ = first.logits


def test_after_a_fork(package: Path, cuda: FakeCuda) -> None:
    """A child can use neither its parent's model nor a new one, and harms nobody by closing."""
    model = load_model(package)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        said = []
        for use in (lambda: model.generate([1], 1), lambda: load_model(package)):
            try:
                use()
            except BaseException as error:  # noqa: BLE001 - what it is is for the parent to judge
                said.append(f"{type(error).__name__}: {error}")
        before = ctypes.CDLL(str(cuda.path)).fake_count()
        model.close()
        said.append(f"{ctypes.CDLL(str(cuda.path)).fake_count() - before} calls")
        os.write(write, "\n".join(said).encode())
        os._exit(0)
    os.waitpid(child, 0)
    used, loaded, closed = os.read(read, 1 << 16).decode().splitlines()
    assert used.startswith("ModelError: cuda:0 (Fake GPU 0): the model was loaded before this process was forked")
    assert loaded.startswith("ModelError: CUDA cannot be started in a process that was forked")
    assert closed == "0 calls"
    with model:
        assert len(model.generate([1], 2).token_ids) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "device: given 'cpu', expected None, 'cuda' or 'cuda:N': the package runs on a GPU"),
        ({"device": "cpu:x86-64-v3"}, "device: given 'cpu:x86-64-v3'"),
        ({"device": "cuda:-1"}, "device: given 'cuda:-1'"),
        ({"device": "cuda:x"}, "device: given 'cuda:x'"),
        ({"device": 0}, "device: given 0"),
        ({"threads": 4}, "threads: given 4, expected nothing: the package 'tiny_gpu_model' runs on a GPU"),
        ({"huge_pages": True}, "huge_pages: given True, expected nothing"),
    ],
)
def test_arguments_of_load(options: dict[str, Any], message: str, package: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_model(package, **options)
    assert message in str(caught.value)


def rewrite(name: str, data: bytes) -> Callable[[Path], None]:
    def change(package: Path) -> None:
        (package / name).write_bytes(data)
        launcher = (package / "launcher.so").exists()
        write_manifest(package, manifest("tiny_gpu_model", launcher))

    return change


def change_variant(**changes: Any) -> Callable[[Path], None]:
    def change(package: Path) -> None:
        document = manifest("tiny_gpu_model", (package / "launcher.so").exists())
        document["target"]["variants"][0].update(changes)
        write_manifest(package, document)

    return change


def change_launcher(package: Path) -> None:
    document = manifest("tiny_gpu_model")
    document["target"]["launcher"] = "other.so"
    write_manifest(package, document)


def without(name: str) -> bytes:
    return archive({key: data for key, data in images().items() if key != name})


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "plan altered": (lambda p: (p / "plan-sm_90.json").write_text("{}"), "plan-sm_90.json has been altered"),
    "no archive": (rewrite("kernels-sm_90.zip", b"PK"), "kernels-sm_90.zip is no archive that this runtime reads"),
    "a kernel is missing": (rewrite("kernels-sm_90.zip", without("mix.cubin")), "has no 'mix.cubin'"),
    "no cubin": (rewrite("kernels-sm_90.zip", archive({**images(), "mix.cubin": b"x"})), "mix.cubin is no cubin"),
    "another function": (
        rewrite("kernels-sm_90.zip", archive({**images(), "mix.cubin": b"\x7fELF9.0 other 9"})),
        "loading mix: cuModuleGetFunction failed",
    ),
    "no capability": (change_variant(capability=None), "variants[0].capability: expected a list of 2 values"),
    "exact": (change_variant(exact=1), "variants[0].exact: expected true or false"),
    "no plan": (change_variant(plan="../plan.json"), "a relative path inside the package"),
    "unlisted": (change_variant(resources="x.json"), "variant 'sm_90' needs 'x.json', which 'files' does not list"),
    "launcher unlisted": (change_launcher, "the launcher needs 'other.so', which 'files' does not list"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_package_says_what_is_wrong(damage: str, copy: Path, cuda: FakeCuda) -> None:
    spoil, message = DAMAGE[damage]
    spoil(copy)
    assert message in error_of(copy)


def test_a_launcher_that_does_not_load_is_done_without(copy: Path, cuda: FakeCuda) -> None:
    (copy / "launcher.so").write_bytes(b"for another machine")
    document = manifest("tiny_gpu_model")
    write_manifest(copy, document, [*{*document_files(copy), "launcher.so"}])
    with load_model(copy) as model:
        assert model.info["loaded"]["launcher"] == "ctypes"
        assert len(model.generate([1], 3).token_ids) == 3


def document_files(package: Path) -> list[str]:
    skipped = ("manifest.json",)
    return [p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and p.name not in skipped]


def test_a_newer_gpu_gets_text(package: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", "10.0")
    with load_model(package) as model:
        loaded = model.info["loaded"]
        assert (loaded["variant"], loaded["code"], loaded["capability"]) == (
            "sm_90",
            "PTX, compiled by the driver",
            "10.0",
        )
        assert len(model.generate([1], 3).token_ids) == 3


def variants(*capabilities: tuple[int, int]) -> list[Variant]:
    return [Variant(f"sm_{a}{b}", "k", "w", (), "p", "r", (a, b), exact=a >= 9) for a, b in capabilities]


@pytest.mark.parametrize(
    ("have", "device", "expected"),
    [
        ([(8, 0), (9, 0)], (9, 0), ("sm_90", False)),
        ([(9, 0), (8, 0)], (8, 9), ("sm_80", False)),
        ([(8, 0), (8, 6)], (8, 9), ("sm_86", False)),
        ([(8, 0), (8, 9)], (8, 6), ("sm_80", False)),
        ([(8, 0), (9, 0)], (12, 0), ("sm_80", True)),
        ([(8, 9), (10, 0)], (10, 3), ("sm_89", True)),
        ([(8, 9), (10, 0)], (10, 0), ("sm_100", False)),
        ([(8, 0), (10, 0)], (9, 0), ("sm_80", True)),
    ],
)
def test_the_choice_of_a_variant(
    have: list[tuple[int, int]], device: tuple[int, int], expected: tuple[str, bool]
) -> None:
    choice = choose_cuda_variant(variants(*have), device, "cuda:0")
    assert (choice.variant.name, choice.ptx) == expected


@pytest.mark.parametrize(
    ("have", "device", "message"),
    [
        (
            [(8, 0), (9, 0)],
            (7, 5),
            "capability 7.5, and the package holds sm_80, sm_90 (and no later one): compile it for cuda:sm_75",
        ),
        (
            [(9, 0)],
            (10, 0),
            (
                "capability 10.0, and the package holds sm_90 (and no later one): compile it for cuda:sm_100, or for "
                "cuda:sm_89, whose code later GPUs take too"
            ),
        ),
        ([(8, 9)], (8, 6), "capability 8.6, and the package holds sm_89: compile it for cuda:sm_86"),
    ],
)
def test_no_variant_fits(have: list[tuple[int, int]], device: tuple[int, int], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        choose_cuda_variant(variants(*have), device, "cuda:0")
    assert str(caught.value).endswith(message)
