"""A user's mistakes at the command line: one clear sentence on standard error, exit 2, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import REPOSITORY

PICOCODE = REPOSITORY / "examples" / "picocode"


def llmc(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmc", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def fails(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 2; one message, without a traceback, that names what it must."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.startswith("llmc: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of picocode to break."""
    return Path(shutil.copytree(PICOCODE, tmp_path / "model"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "broken"


def nothing_left(output: Path) -> None:
    assert not output.parent.exists() or list(output.parent.iterdir()) == []


def change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


MISTAKES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ("safetensors",)),
    "truncated weights": (lambda m: os.truncate(m / "model.safetensors", 100_000), ("model.safetensors",)),
    "wrong dtype": (
        lambda m: replace_bytes(m / "model.safetensors", b'"dtype":"BF16"', b'"dtype":"I16" '),
        ("I16", "BF16"),
    ),
    "wrong shape": (lambda m: change_config(m, intermediate_size=700), ("gate_proj", "704", "700")),
    "missing tensors": (lambda m: change_config(m, num_hidden_layers=7), ("model.layers.6",)),
    "unused tensors": (lambda m: change_config(m, num_hidden_layers=5), ("model.layers.5",)),
    "unknown model type": (lambda m: change_config(m, model_type="lama"), ("lama", "llama")),
    "unknown key": (lambda m: change_config(m, attention_window_of_mine=3), ("attention_window_of_mine",)),
    "absurd size": (lambda m: change_config(m, hidden_size=1 << 40), ("hidden_size",)),
    "config is no JSON": (lambda m: (m / "config.json").write_text("{"), ("config.json",)),
    "no config": (lambda m: (m / "config.json").unlink(), ("config.json",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_model_that_is_broken(mistake: str, model: Path, output: Path) -> None:
    spoil, words = MISTAKES[mistake]
    spoil(model)
    fails(llmc("compile", model, "-o", output), *words)
    nothing_left(output)


def test_output_that_exists(output: Path) -> None:
    output.mkdir(parents=True)
    (output / "mine.txt").write_text("precious")
    fails(llmc("compile", PICOCODE, "-o", output), "exists", "--force")
    fails(llmc("compile", PICOCODE, "-o", output, "--force"), "no llmc package")
    assert (output / "mine.txt").read_text() == "precious"


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fails(llmc("compile", PICOCODE, "-o", tmp_path / "file" / "package"), "cannot write")


def test_a_name_that_cannot_be_imported(tmp_path: Path) -> None:
    fails(llmc("compile", PICOCODE, "-o", tmp_path / "my-model"), "my-model", "--name")
    nothing_left(tmp_path / "x")


def test_a_disk_that_fills_up(output: Path) -> None:
    """A limit on file size makes the kernel refuse the write of weights.bin, as a full disk does."""

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))

    done = llmc("compile", PICOCODE, "-o", output, preexec_fn=small_files)
    fails(done, "cannot write the package")
    nothing_left(output)


def test_an_interrupt_halfway(output: Path) -> None:
    # A shell that starts the tests in the background has them, and so this process, ignore interrupts.
    heeding = ["env", "--default-signal=INT"]
    command = [*heeding, sys.executable, "-m", "llmc", "compile", str(PICOCODE), "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (output.parent.exists() and any(output.parent.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    nothing_left(output)


@pytest.fixture
def package(compiled: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the compiled picocode to break."""
    return Path(shutil.copytree(compiled(PICOCODE), tmp_path / "package"))


@pytest.mark.parametrize("name", ["plan.json", "checks.json", "tokenizer.json"])
def test_an_altered_file(name: str, package: Path) -> None:
    path = package / name
    path.write_bytes(path.read_bytes() + b" ")
    fails(llmc("run", package, "-p", "def", "-n", "2"), name)


def test_altered_kernels(package: Path) -> None:
    (path,) = package.glob("kernels-*.so")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))
    fails(llmc("run", package, "-p", "def", "-n", "2"), path.name)


def test_altered_weights_are_found_by_verify(package: Path) -> None:
    path = package / "weights.bin"
    data = bytearray(path.read_bytes())
    data[1000:200_000] = bytes(199_000)
    path.write_bytes(bytes(data))
    done = llmc("verify", package)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr


def test_an_instruction_set_that_this_machine_lacks(package: Path) -> None:
    path = package / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["target"]["variants"][0]["requires"] = ["avx2", "amx_of_tomorrow"]
    path.write_text(json.dumps(manifest))
    fails(llmc("run", package, "-p", "def", "-n", "2"), "amx_of_tomorrow")


def test_prompts_that_do_not_fit(load: Callable[..., Any]) -> None:
    model = load(PICOCODE)
    with pytest.raises(ValueError, match="1024"):
        model.generate([5] * 1100)
    with pytest.raises(ValueError, match="4096"):
        model.generate([5, 4096])
    with pytest.raises(ValueError, match="-1"):
        model.generate([-1])


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    fails(llmc("run", tmp_path, "-p", "x"), "manifest.json")
    fails(llmc("verify", tmp_path), "manifest.json")
    fails(llmc("bench", tmp_path), "manifest.json")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = llmc("--debug", "run", tmp_path, "-p", "x")
    assert done.returncode != 0 and "Traceback" in done.stderr
