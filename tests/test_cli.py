"""The command line: what each command prints, in text and as JSON, and its exit status."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llmc import cli
from tests.fixtures import REPOSITORY

PICOCODE = REPOSITORY / "examples" / "picocode"


@pytest.fixture
def llmc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`llmc(arguments…)`: exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["llmc", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
            raise SystemExit(0)
        status = done.value.code
        assert isinstance(status, int)
        return (status, *capsys.readouterr())

    return run


Llmc = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def package(compiled: Callable[..., Path]) -> Path:
    return compiled(PICOCODE)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example(command: str, llmc: Llmc) -> None:
    status, out, _ = llmc(command, "--help")
    assert status == 0
    assert f"Example: llmc {command} " in out


def test_version(llmc: Llmc) -> None:
    assert llmc("--version") == (0, "0.1.0\n", "")


def test_run(package: Path, llmc: Llmc) -> None:
    status, out, err = llmc("run", package, "-p", "import os\n", "-n", "8")
    assert (status, err) == (0, "")
    assert out.startswith("import os\n")
    status, as_json, _ = llmc("run", package, "-p", "import os\n", "-n", "8", "--json")
    completion = json.loads(as_json)
    assert status == 0 and completion["finish_reason"] == "length" and len(completion["token_ids"]) == 8
    assert out == f"import os\n{completion['text']}\n"


def test_run_refuses_bad_sampling(package: Path, llmc: Llmc) -> None:
    status, out, err = llmc("run", package, "-p", "x", "--temperature", "-1")
    assert (status, out) == (2, "") and "temperature" in err and err.count("\n") == 1


def test_run_chat_without_a_template(package: Path, llmc: Llmc) -> None:
    status, _, err = llmc("run", package, "-p", "x", "--chat")
    assert status == 2 and "chat template" in err


def test_verify_against_the_source(package: Path, llmc: Llmc) -> None:
    status, out, _ = llmc("verify", package, "--against", PICOCODE, "--json")
    report = json.loads(out)
    assert status == 0 and report["ok"] and report["first_divergent_node"] is None
    assert report["top1"] == 1.0 and report["kl"] < 1e-5


@pytest.mark.parametrize("command", [("verify", "{package}", "--against", PICOCODE), ("inspect", PICOCODE)])
def test_a_description_of_ones_own(command: tuple[str, ...], package: Path, tmp_path: Path, llmc: Llmc) -> None:
    """What was compiled with a description is compared and looked at with it."""
    (tmp_path / "mine.toml").write_text('extends = "llama"\nmodel_types = ["mine"]\n')
    words = [package if word == "{package}" else word for word in command]
    assert llmc(*words, "--architecture", tmp_path / "mine.toml")[0] == 0
    status, _, err = llmc(*words, "--architecture", tmp_path / "none.toml")
    assert status == 2 and "cannot read the description" in err


def test_verify_names_the_first_divergent_node(package: Path, tmp_path: Path, llmc: Llmc) -> None:
    """Weights whose third layer's down projection was zeroed, and the hashes made to fit."""
    broken = Path(shutil.copytree(package, tmp_path / "broken"))
    plan = json.loads((broken / "plan.json").read_text())
    name = "pack_panels(model.layers.2.mlp.down_proj.weight)"
    place = next(b for b in plan["buffers"] if b.get("name") == name)
    weights = broken / "weights.bin"
    data = bytearray(weights.read_bytes())
    data[place["offset"] : place["offset"] + place["bytes"]] = bytes(place["bytes"])
    weights.write_bytes(bytes(data))
    status, out, _ = llmc("verify", broken, "--against", PICOCODE)
    assert status == 1
    assert "first divergent node: packed_linear at model.layers.2.mlp.down_proj" in out


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_import(form: tuple[str, ...], llmc: Llmc) -> None:
    status, out, err = llmc("import", PICOCODE, "--max-sequence-length", "99", *form)
    assert (status, err) == (0, "")
    if form:
        report = json.loads(out)
        assert report["max_sequence_length"] == 99 and report["raised"]["fuse-mlp"]["gated-linear"] == 6
    else:
        assert "  attention      6  model.layers.{layer}.self_attn\n" in out
        assert out.endswith("compiles to a step\n")


def test_import_of_what_is_not_there(llmc: Llmc, tmp_path: Path) -> None:
    status, out, err = llmc("import", tmp_path / "none.pt2")
    assert (status, out) == (2, "") and "none.pt2" in err


def test_inspect(package: Path, llmc: Llmc) -> None:
    assert "repeat layer = 0..5" in llmc("inspect", PICOCODE)[1]
    assert "attention(" in llmc("inspect", package, "--pass", "fuse-attention")[1]
    assert "packed_linear(" in llmc("inspect", package, "--entry", "decode")[1]
    assert llmc("inspect", PICOCODE, "--format", "dot")[1].startswith("digraph main {")
    status, _, err = llmc("inspect", PICOCODE, "--pass", "fuse-atention")
    assert status == 2 and "fuse-attention" in err


def test_dumps_are_read_by_opt(tmp_path: Path, llmc: Llmc) -> None:
    dump = tmp_path / "dump"
    status, out, err = llmc(
        "compile", PICOCODE, "-o", tmp_path / "p", "--name", "p", "--dump-ir", dump, "--check-numerics", "--json"
    )
    assert status == 0, err
    assert json.loads(out)["seconds"].keys() == {"import", "passes", "kernels", "packing", "checks"}
    assert list(dump.glob("*-fuse-attention.ir")) and list(dump.glob("*-fuse-attention.diff"))
    first = min(dump.glob("000-*.ir"))
    status, text, why = llmc("opt", first, "-p", "canonicalize,fuse-norm", "--explain", "fuse-norm")
    assert status == 0 and "rms_norm(" in text and "fuse-norm" in why
    limited = llmc("opt", first, "-p", "canonicalize,fuse-norm", "--rewrite-limit", "0")[1]
    assert "rms_norm(" not in limited


def test_bench(package: Path, llmc: Llmc) -> None:
    status, out, _ = llmc(
        "bench", package, "--prefill", "20", "--decode", "4", "--batch", "3", "--repeat", "1", "--json"
    )
    report = json.loads(out)
    assert status == 0 and report["decode_tokens_per_second"] > 0 and report["share_of_bandwidth"] > 0
    status, _, err = llmc("bench", package, "--prefill", "2000")
    assert status == 2 and "1024" in err


def test_bench_ledger(package: Path, llmc: Llmc) -> None:
    status, out, _ = llmc("bench", package, "--ledger", "--prefill", "20", "--decode", "4", "--repeat", "1", "--json")
    ledger = json.loads(out)
    assert status == 0 and ledger["coverage"] > 0
    assert sum(row["seconds"] for row in ledger["rows"]) == pytest.approx(ledger["sum_seconds"])
    status, _, err = llmc("bench", package, "--ledger", "--prefill", "2000")
    assert status == 2 and "1024" in err
