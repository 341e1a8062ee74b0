"""Same input, same bytes; sizes; compile time flat in the number of layers."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from llmc.driver import compile_model
from llmc.options import CompileOptions
from tests.fixtures import REPOSITORY

PICOCODE = REPOSITORY / "examples" / "picocode"


def hashes(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_two_compiles_give_equal_bytes(tmp_path: Path) -> None:
    """In two processes, two folders, with other hash seeds; the wheels too."""
    made = []
    for i in range(2):
        output = tmp_path / f"place{i}" / "picocode"
        command = [sys.executable, "-m", "llmc", "compile", str(PICOCODE), "-o", str(output), "--wheel"]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": str(i)}, cwd=tmp_path)
        wheels = sorted(output.parent.glob("*.whl"))
        assert len(wheels) == 1
        made.append((hashes(output), wheels[0].name, hashlib.sha256(wheels[0].read_bytes()).hexdigest()))
    assert made[0] == made[1]
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheels[0])]
    subprocess.run(pip, check=True)
    assert hashes(target / "picocode") == made[0][0]
    listed = json.loads((output / "manifest.json").read_text())["files"]
    assert {n: f["sha256"] for n, f in listed.items()} == {k: v for k, v in made[0][0].items() if k != "manifest.json"}


def test_size_without_weights(tmp_path: Path) -> None:
    output = tmp_path / "portable"
    compile_model(PICOCODE, output, CompileOptions(target="cpu:portable"))
    total = sum(p.stat().st_size for p in output.rglob("*") if p.is_file() and p.name != "weights.bin")
    assert total <= 5_000_000


def config(folder: Path, layers: int) -> Path:
    settings = json.loads((PICOCODE / "config.json").read_text())
    path = folder / f"layers{layers}.json"
    path.write_text(json.dumps({**settings, "num_hidden_layers": layers, "hidden_size": 128, "num_attention_heads": 4}))
    return path


def test_kernels_are_compiled_once_for_all_layers(tmp_path: Path) -> None:
    """The count of distinct kernels decides, not a clock: it is the same for 4 and 32 layers."""
    reports = [
        compile_model(config(tmp_path, n), tmp_path / f"m{n}", CompileOptions(random_weights=True)) for n in (4, 32)
    ]
    assert set(reports[0].kernel_seconds) == set(reports[1].kernel_seconds)
    assert 8 < len(reports[0].kernel_seconds) < 40
