"""A package stands alone: numpy and tokenizers, and nothing of the compiler, whatever else is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import REPOSITORY

PICOCODE = REPOSITORY / "examples" / "picocode"
PROMPT = "def fibonacci(n):\n"
FORBIDDEN = ("llmc", "torch", "triton", "tvm", "tvm_ffi")

WATCHED = """
import json, os, sys, tempfile
seen = []
def watch(event, args):
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.system"):
        seen.append(event)
    elif event.startswith("socket."):
        seen.append(event)
    elif event == "open" and isinstance(args[0], (str, bytes)):
        mode, flags = args[1], args[2]
        writes = any(c in mode for c in "wax+") if mode else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and not os.fsdecode(args[0]).startswith(tempfile.gettempdir()):
            seen.append(f"write {args[0]}")
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        seen.append(event)
import numpy, tokenizers
sys.addaudithook(watch)
sys.path.insert(0, sys.argv[1])
import model_a
model = model_a.load()
first = model.generate(PROMPT, max_new_tokens=24)
assert model.verify().ok
import model_b
second = model_b.load().generate(PROMPT, max_new_tokens=24)
again = model.generate(PROMPT, max_new_tokens=24)
print(json.dumps({
    "seen": seen,
    "modules": sorted(m for m in FORBIDDEN if m in sys.modules),
    "text": first.text,
    "same": first.token_ids == second.token_ids == again.token_ids,
}))
"""


@pytest.fixture
def two_packages(compiled: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with the package twice, under other names: moved from where it was compiled."""
    for name in ("model_a", "model_b"):
        shutil.copytree(compiled(PICOCODE, name=name), tmp_path / "moved" / name)
    return tmp_path / "moved"


def report(python: Path | str, script: str, *arguments: str, cwd: Path) -> Any:
    done = subprocess.run(
        [str(python), "-P", "-c", script, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/nonexistent", "HOME": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(result: Any) -> None:
    assert result["seen"] == []
    assert result["modules"] == []
    assert result["same"]
    golden = json.loads((PICOCODE / "golden.json").read_text())["cases"]
    expected = next(c["text"] for c in golden if c["prompt"] == PROMPT)
    assert expected.startswith(result["text"])
    assert len(result["text"]) > 20


def test_where_the_compiler_is_installed(two_packages: Path) -> None:
    script = WATCHED.replace("PROMPT", repr(PROMPT)).replace("FORBIDDEN", repr(FORBIDDEN))
    check(report(sys.executable, script, str(two_packages), cwd=two_packages))


def test_where_only_numpy_and_tokenizers_are(two_packages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", "tokenizers"], check=True)
    installed = subprocess.run(
        [
            python,
            "-c",
            "import importlib.util as u; print([m for m in MODULES if u.find_spec(m)])".replace(
                "MODULES", repr(FORBIDDEN)
            ),
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert installed.stdout.strip() == "[]"
    script = WATCHED.replace("PROMPT", repr(PROMPT)).replace("FORBIDDEN", repr(FORBIDDEN))
    check(report(python, script, str(two_packages), cwd=two_packages))


@pytest.mark.parametrize(
    "order", [("torch", "tvm", "model_a"), ("model_a", "torch", "tvm"), ("tvm", "model_a", "torch")]
)
def test_beside_torch_and_tvm_in_every_order(order: tuple[str, ...], two_packages: Path) -> None:
    for module in ("torch", "tvm"):
        pytest.importorskip(module)
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        + "\n".join(
            f"import {m}" + ("; model = model_a.load(); model.generate([1, 2, 3], max_new_tokens=4)" * (m == "model_a"))
            for m in order
        )
        + "\nimport model_b; b = model_b.load()"
        + "\ntexts = [m.generate([1, 5, 9], max_new_tokens=8).token_ids for m in (model, b)]"
        + "\nprint(json.dumps(texts[0] == texts[1]))"
    )
    assert report(sys.executable, script, str(two_packages), cwd=two_packages) is True


def test_a_generate_in_a_forked_child(two_packages: Path) -> None:
    """The thread pool is rebuilt after fork."""
    script = (
        "import json, os, sys; sys.path.insert(0, sys.argv[1]); import model_a\n"
        "model = model_a.load(threads=2); want = model.generate([1, 2, 3], max_new_tokens=8).token_ids\n"
        "read, write = os.pipe(); pid = os.fork()\n"
        "if pid == 0:\n"
        "    os.write(write, json.dumps(model.generate([1, 2, 3], max_new_tokens=8).token_ids).encode()); os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
        "again = model.generate([1, 2, 3], max_new_tokens=8).token_ids\n"
        "print(json.dumps(json.loads(os.read(read, 4096)) == want == again))"
    )
    assert report(sys.executable, script, str(two_packages), cwd=two_packages) is True


def test_import_is_quick(two_packages: Path) -> None:
    """Under 200 ms beside what numpy and tokenizers take themselves; the best of five, as machines are shared."""
    script = (
        "import sys; import numpy, tokenizers; sys.path.insert(0, sys.argv[1]); import time; t = time.perf_counter()\n"
        "import model_a; print(time.perf_counter() - t)"
    )
    assert min(report(sys.executable, script, str(two_packages), cwd=two_packages) for _ in range(5)) < 0.2
