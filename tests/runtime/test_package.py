"""A package on disk, loaded and run: kernels through the native step, alterations, isolation, the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmc.runtime.batch import Chunk, build_batch
from llmc.runtime.errors import ModelError
from llmc.runtime.executor import NativeExecutor
from llmc.runtime.load import load_model
from llmc.runtime.manifest import FORMAT_VERSION
from tests.runtime.packages import (
    CONTEXT,
    VOCAB,
    WINDOW,
    manifest,
    plan,
    reference,
    weights,
    write_manifest,
    write_package,
)

NODES = ("gather", "layer.append", "layer.mix", "head")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("packages") / "tiny_model", tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def package(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "tiny_model"))


@pytest.mark.parametrize("threads", [None, 1, 2, 5])
@pytest.mark.parametrize("huge_pages", [False, True])
def test_kernels_compute_the_reference(original: Path, threads: int | None, huge_pages: bool) -> None:
    ids = np.random.default_rng(2).integers(0, VOCAB, CONTEXT).tolist()
    with load_model(original, threads=threads, huge_pages=huge_pages, check=True) as model:
        np.testing.assert_array_equal(model.logits(ids), reference(ids))
        prompts = [ids[:n] for n in (1, 7, 20, 3, 11, 2)]
        for completion in model.generate(prompts, 15):
            whole = completion.prompt_token_ids + completion.token_ids
            assert whole[len(completion.prompt_token_ids) :] == [
                int(row.argmax()) for row in reference(whole)[len(completion.prompt_token_ids) - 1 : -1]
            ]
        assert model.verify().ok
        assert model.info["loaded"]["threads"] == (threads or len(os.sched_getaffinity(0)))
        assert model.info["kernels"] == ["append", "mix", "head", "gather"]


def test_a_forked_sequence_copies_blocks_of_real_states(original: Path) -> None:
    with load_model(original) as model, model.sequence() as sequence:
        sequence.prefill([1, 2, 3, 4, 5, 6])
        with sequence.fork() as other:
            for token in (7, 8, 9):
                np.testing.assert_array_equal(other.step(token).logits[0], reference([*other.token_ids])[-1])
            np.testing.assert_array_equal(sequence.step(2).logits[0], reference([1, 2, 3, 4, 5, 6, 2])[-1])


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages") / "tiny_windowed_model"
    return write_package(folder, tmp_path_factory.mktemp("kernels"), windowed=True)


def test_a_package_with_a_window(windowed: Path) -> None:
    """Two groups of layers, each with states, slots and tables of its own."""
    ids = np.random.default_rng(2).integers(0, VOCAB, CONTEXT).tolist()
    with load_model(windowed, threads=2, check=True) as model:
        np.testing.assert_array_equal(model.logits(ids), reference(ids, windowed=True))
        prompts = [ids[:n] for n in (1, 7, 20, 3, 11, 2)]
        for completion in model.generate(prompts, 15):
            whole = completion.prompt_token_ids + completion.token_ids
            rows = reference(whole, windowed=True)[len(completion.prompt_token_ids) - 1 : -1]
            assert completion.token_ids == rows.argmax(1).tolist()
        assert model.verify().ok
        with model.sequence() as sequence:
            sequence.prefill(ids[:18])
            with sequence.fork() as other:
                sequence.prefill(ids[18:36])
                for token in (7, 8, 9):
                    expected = reference([*other.token_ids, token], windowed=True)[-1]
                    np.testing.assert_array_equal(other.step(token).logits[0], expected)
            row = sequence.step(2).logits[0]
            np.testing.assert_array_equal(row, reference([*ids[:36], 2], windowed=True)[-1])
        (one,) = model.generate([ids[:20]], 11, profile=True, ignore_eos=True)
        moved = {row.node: row.bytes for row in one.timings.profile if row.entry == "decode"}
        assert moved["layer.mix"] == 10 * (8 + 4) + 4 * sum(range(20, 30))
        assert moved["second.recent"] == 10 * (8 + 4) + 4 * 10 * WINDOW, "no more context counts than it sees"
        executor = model._engine.executor
        assert isinstance(executor, NativeExecutor)
        # Of four sequences of the longest, and one that a long prefill keeps, each with a window and a step of tokens.
        assert executor.num_blocks == (4 * 10, 5 * 6)
        assert [len(state) for state in executor._states] == [40, 30]


def test_each_task_has_private_memory(original: Path) -> None:
    """In a step of few tokens every task fills its own; in longer ones, and in a trace, the first's serves all."""
    for tokens, filled in ((1, 3), (8, 3), (9, 1)):
        ids = list(range(tokens))
        rows = weights()[1][ids]
        with load_model(original, threads=3) as model, model.sequence() as sequence:
            assert isinstance(sequence.engine.executor, NativeExecutor)
            private = sequence.engine.executor._private
            assert private.shape == (3, 4096), "whole pages"
            np.testing.assert_array_equal(sequence.prefill(ids).logits[0], reference(ids)[-1])
            for task, memory in enumerate(private):
                found = memory[64 : 64 + rows.nbytes].view(np.float32).reshape(rows.shape)
                np.testing.assert_array_equal(found, rows if task < filled else 0 * rows)


def test_a_trace_reads_what_tasks_share(original: Path) -> None:
    ids = np.array([3, 1, 4], np.int32)
    with load_model(original, threads=3) as model, model.sequence() as sequence:
        executor, table = sequence.engine.executor, sequence.table
        assert isinstance(executor, NativeExecutor)
        with sequence.engine.exclusive():
            table.extend(len(ids), executor.copy_block)
            reads = list(executor.trace("prefill", build_batch([Chunk(table, ids, 1)], executor.block_size)))
        np.testing.assert_array_equal(reads[0](2, np.float32, (3, VOCAB)), weights()[1][ids])
        np.testing.assert_array_equal(reads[3](3, np.float32, (1, VOCAB))[0], reference(ids.tolist())[-1])
        assert not executor._private[1:].any()


def test_a_profile_names_every_launch(original: Path) -> None:
    with load_model(original) as model:
        timings = model.generate([1, 2, 3], 5, profile=True).timings
        rows = {(row.entry, row.node): row for row in timings.profile}
        assert set(rows) == {(e, n) for e in ("decode", "prefill") for n in NODES}
        decode = rows["decode", "head"]
        assert (decode.calls, decode.kernel) == (4, "head")
        assert decode.bytes == 4 * 8 + 4 * 4 + 4 * (3 + 4 + 5 + 6), "fixed, per token, per token of context"
        assert all(row.seconds > 0 for row in timings.profile)
        assert sum(row.seconds for row in timings.profile) < timings.prefill_seconds + timings.decode_seconds
        assert model.generate([1, 2, 3], 5).timings.profile == ()


def test_threads_use_one_model(original: Path) -> None:
    found = {}
    with load_model(original, threads=2) as model:

        def work(i: int) -> None:
            found[i] = [model.generate([i, j], 20).token_ids for j in range(5)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {i: [model.generate([i, j], 20).token_ids for j in range(5)] for i in range(4)}


def alter(name: str) -> Callable[[Path], None]:
    def change(package: Path) -> None:
        data = bytearray((package / name).read_bytes())
        data[len(data) // 2] ^= 1
        (package / name).write_bytes(bytes(data))

    return change


def change_manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda package: write_manifest(package, {**manifest("tiny_model"), **changes})


def change_target(**changes: Any) -> Callable[[Path], None]:
    target = manifest("tiny_model")["target"]
    variant = {**target["variants"][0], **changes.pop("variant", {})}
    return change_manifest(target={**target, "variants": [variant], **changes})


def change_plan(**changes: Any) -> Callable[[Path], None]:
    def change(package: Path) -> None:
        (package / "plan.json").write_text(json.dumps({**plan(), **changes}))
        write_manifest(package, manifest("tiny_model"))

    return change


def not_a_library(package: Path) -> None:
    (package / "kernels-any.so").write_bytes(b"not a library")
    write_manifest(package, manifest("tiny_model"))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "plan.json altered": (alter("plan.json"), "plan.json has been altered: expected sha256"),
    "checks.json altered": (alter("checks.json"), "checks.json has been altered"),
    "kernels altered": (alter("kernels-any.so"), "kernels-any.so has been altered"),
    "runtime altered": (alter("runtime/sampler.py"), "sampler.py has been altered"),
    "weights altered": (alter("weights.bin"), "weights.bin has been altered"),
    "weights cut": (lambda p: os.truncate(p / "weights.bin", 99), "weights.bin has been altered: expected"),
    "plan.json missing": (lambda p: (p / "plan.json").unlink(), "plan.json cannot be read"),
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), "cannot read"),
    "manifest no JSON": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is no JSON"),
    "manifest a list": (lambda p: (p / "manifest.json").write_text("[]"), "expected an object"),
    "newer": (change_manifest(format_version=FORMAT_VERSION + 1), f"format_version {FORMAT_VERSION + 1} is newer"),
    "too old": (change_manifest(format_version=FORMAT_VERSION - 2), "format_version 1 is too old"),
    "not a version": (change_manifest(format_version="1"), "format_version: expected an integer"),
    "other target": (change_target(kind="npu"), "is for 'npu'"),
    "other machine": (change_target(machine="sparc"), "was compiled for sparc"),
    "missing features": (change_target(variant={"requires": ["sse9", "avx99_x"]}), "any needs sse9, avx99_x"),
    "newer glibc": (change_manifest(requires={"glibc": "9.1"}), "needs glibc 9.1 or newer"),
    "way out": (change_target(variant={"weights": "../weights.bin"}), "a relative path inside the package"),
    "absolute": (change_target(variant={"kernels": "/x/kernels.so"}), "a relative path inside the package"),
    "unlisted": (change_target(variant={"kernels": "other.so"}), "which 'files' does not list"),
    "no library": (not_a_library, "cannot load"),
    "missing kernel": (change_plan(kernels=["append", "mix", "head", "no_such"]), "has no kernel 'no_such'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_package_says_what_is_wrong(damage: str, package: Path) -> None:
    spoil, message = DAMAGE[damage]
    spoil(package)
    with pytest.raises(ModelError) as caught:
        load_model(package, check=True)
    assert message in str(caught.value)


def test_weights_are_hashed_when_asked(package: Path) -> None:
    alter("weights.bin")(package)
    with load_model(package) as model:
        assert model.info["name"] == "tiny_model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads: given 0, expected an integer from 1 to 1024 or None"),
        ({"threads": True}, "threads: given True"),
        ({"threads": 2000}, "threads: given 2000"),
        ({"device": "cuda"}, "device: given 'cuda', expected None, 'cpu' or one of ['cpu:any']"),
        ({"device": 0}, "device: given 0"),
        ({"device": "cpu:x"}, "device: given 'cpu:x', expected one of ['cpu:any']"),
        ({"huge_pages": "yes"}, "huge_pages: given 'yes'"),
        ({"check": 1}, "check: given 1"),
    ],
)
def test_arguments_of_load(options: dict[str, Any], message: str, original: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_model(original, **options)
    assert message in str(caught.value)


def run(package: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Python in isolation, with the package's folder as the only addition to its path."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=package.parent,
        env={"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


SCRIPT = """
import sys
import numpy, tokenizers
before = set(sys.modules)
import tiny_model
assert "info" not in vars(tiny_model)
assert tiny_model.info["name"] == "tiny_model"
model = tiny_model.load(threads=2)
out = model.generate([1, 2, 3], max_new_tokens=4)
assert isinstance(out, tiny_model.Completion) and issubclass(tiny_model.ModelError, RuntimeError)
forbidden = {"llmc", "torch", "tvm", "tvm_ffi", "triton", "jinja2", "socket", "subprocess", "ssl"}
print(tiny_model.__version__, tiny_model.__all__ == sorted(tiny_model.__all__), forbidden & (set(sys.modules) - before))
try:
    tiny_model.nothing
except AttributeError as error:
    print(error)
"""


def test_the_package_imports_nothing_else(original: Path) -> None:
    done = run(original, "-c", SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0.0.1 True set()", "module 'tiny_model' has no attribute 'nothing'"]


def test_the_command_line_reports_mistakes(original: Path) -> None:
    done = run(original, "-m", "tiny_model", "text")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "python -m tiny_model: prompt: given text, expected a list of token ids: the package has no tokenizer\n"
    )
    help_text = run(original, "-m", "tiny_model", "--help")
    assert help_text.returncode == 0 and "--repetition-penalty" in help_text.stdout
