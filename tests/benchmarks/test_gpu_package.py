"""Packages without weights: compiled, filled at random, and run kernel by kernel in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import first_token
from benchmarks.gpu.bounds import Shape, plan_bytes, row_bytes
from benchmarks.gpu.fill import fill_parameter, fill_parameters, fill_state
from benchmarks.gpu.package import OpenPackage, make_batch, seen_blocks
from benchmarks.gpu.prepare import Remembering, drop_texts, prepare
from benchmarks.gpu.rows import LONGEST, Row, Setup
from llmc.backends.triton.source import KernelSource
from llmc.ir.target import GPU_VARIANTS
from llmc.runtime.errors import ModelError
from llmc.runtime.manifest import read_manifest
from llmc.runtime.plan import FULL, LayerGroup
from tests.backends.triton.interpreted_device import InterpretedDevice
from tests.backends.triton.interpreted_package import compile_interpreted

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 199,
}
DECODE = Row("decode", Setup("8b", "bf16", "bf16"), batch=2, context=20)
PREFILL = Row("prefill", Setup("8b", "bf16", "bf16"), batch=1, context=24)


def compile_tiny(
    monkeypatch: pytest.MonkeyPatch, folder: Path, quant: str = "none", **options: Any
) -> dict[str, KernelSource]:
    (folder.parent / "config.json").write_text(json.dumps(TINY))
    given = {"random_weights": True, "quant": quant, "checks": 0, "weights": False, **options}
    return compile_interpreted(monkeypatch, folder.parent / "config.json", folder, **given)


def host_bytes(address: int, size: int) -> torch.Tensor:
    """What `fill.device_bytes` gives, of a device whose memory is the host's."""
    import ctypes

    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def open_tiny(monkeypatch: pytest.MonkeyPatch, folder: Path, sources: dict[str, KernelSource]) -> OpenPackage:
    monkeypatch.setattr("benchmarks.gpu.package.device_bytes", host_bytes)
    device: Any = InterpretedDevice(sources)
    device.launcher = "interpreted"
    return OpenPackage(folder, device)


@pytest.mark.parametrize(("quant", "cache"), [("none", None), ("q4g128", "fp8"), ("q8g128", "int8")])
def test_a_package_without_weights_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quant: str, cache: str | None
) -> None:
    sources = compile_tiny(monkeypatch, tmp_path / "tiny", quant, kv_quant=cache)
    assert not (tmp_path / "tiny/weights.bin").exists()
    package = open_tiny(monkeypatch, tmp_path / "tiny", sources)
    for row in (DECODE, PREFILL):
        steps = package.steps(row)
        steps.check()
        before = package.device.replays  # type: ignore[attr-defined]
        steps.start(2)
        assert package.device.replays == before + 2  # type: ignore[attr-defined]
        assert package.device.waits
        facts = package.facts(row)
        assert facts["kernels"] == len(package.launches(row)) and facts["graph_nodes"] == facts["kernels"] + 2
        assert facts["memory_planned"] == sum(facts["memory"].values())
    weights = package.manifest["files"]["weights.bin"]["bytes"]
    moved = package.facts(DECODE)["plan_bytes"]
    table = 2 * TINY["vocab_size"] * TINY["hidden_size"]  # type: ignore[operator]
    assert weights - table < moved < weights + 100_000
    with pytest.raises(ValueError, match="blocks of keys and values"):
        package.steps(Row("decode", DECODE.setup, batch=4, context=1000))
    package.close()


def test_weights_lie_where_they_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_tiny(monkeypatch, tmp_path / "tiny")
    compile_tiny(monkeypatch, tmp_path / "whole", weights=True)
    plans = [(tmp_path / name / "plan-sm_90.json").read_bytes() for name in ("tiny", "whole")]
    assert plans[0] == plans[1]
    entries = [
        json.loads((tmp_path / n / "manifest.json").read_text())["files"]["weights.bin"] for n in ("tiny", "whole")
    ]
    assert entries[0] == {"bytes": entries[1]["bytes"]}
    assert (tmp_path / "whole/weights.bin").stat().st_size == entries[1]["bytes"]
    with pytest.raises(ModelError):
        read_manifest(tmp_path / "tiny")


def test_the_plan_counts_the_bytes_of_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two counts that share nothing: the compiler's costs of its launches, and arithmetic on the configuration."""
    row = Row("decode", Setup("8b", "int4", "fp8"), batch=8, context=8192)
    options = {"random_weights": True, "checks": 0, "weights": False, "max_sequence_length": LONGEST, "limits": None}
    quant = {"quant": row.setup.quant, "kv_quant": row.setup.cache}
    compile_interpreted(monkeypatch, row.setup.config, tmp_path / "eight", **options, **quant)
    plan = json.loads((tmp_path / "eight/plan-sm_90.json").read_text())
    bucket = next(b for b in plan["entries"]["decode"]["buckets"] if b["tokens"] == 8)
    assert len(bucket["launches"]) == 5 * 32 + 5  # what predictions assume
    counted = plan_bytes(bucket["launches"], row.batch, row.batch * row.context)
    assert counted == pytest.approx(row_bytes(row, Shape.read(row.setup.config)), rel=0.01)


def test_a_completed_package_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_tiny(monkeypatch, tmp_path / "tiny", "q8g128")
    drop_texts(tmp_path / "tiny")
    assert not list((tmp_path / "tiny/graph").glob("*.ir"))
    size = first_token.write_complete(tmp_path / "tiny", tmp_path / "done/tiny", "cpu")
    manifest = read_manifest(tmp_path / "done/tiny")
    manifest.check_files(weights=True)
    assert manifest.files["weights.bin"].bytes == size
    assert first_token.read_seconds(tmp_path / "done/tiny/weights.bin") > 0


def test_a_new_process_is_timed(tmp_path: Path) -> None:
    package = tmp_path / "pretended"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import time, types\n"
        "def load():\n"
        "    time.sleep(0.1)\n"
        "    return types.SimpleNamespace(generate=lambda ids, max_new_tokens, ignore_eos:"
        " types.SimpleNamespace(token_ids=[len(ids)]))\n"
    )
    found = first_token.run(package, 16)
    assert found["load"] >= 0.1
    assert found["total"] == pytest.approx(sum(found[n] for n in ("process", "import", "load", "prefill")), abs=1e-3)
    (package / "__init__.py").write_text("raise OSError('no driver')")
    with pytest.raises(RuntimeError, match="no driver"):
        first_token.run(package, 16)


def test_random_values() -> None:
    torch.manual_seed(0)
    sizes = {
        "pack_blocks{bits=0}(model.layers.0.mlp.down_proj.weight)": ("bf16", 64),
        "cast{dtype=f32}(model.layers.0.input_layernorm.weight)": ("f32", 16),
        "pack_blocks{bits=4}(quantize_weight{format=q4g128}(x))": ("i32", 64),
        "pack_scales{group=128}(quantize_weight#1{format=q4g128}(x))": ("f16", 64),
        "constant:1234": ("f32", 16),
        "quantize_weight{format=fp8}(x)": ("f8e4m3", 64),
    }
    rows, end = [], 0
    for name, (dtype, size) in sizes.items():
        rows.append({"name": name, "dtype": dtype, "offset": end, "bytes": size * 64})
        end += size * 64
    memory = torch.zeros(end, dtype=torch.uint8)
    table = torch.arange(256, dtype=torch.float32).view(torch.uint8)
    fill_parameters(memory, rows, 256, {"constant:1234": table})
    matrix, norm, codes, scales, constant, floats = (memory[r["offset"] :][: r["bytes"]] for r in rows)
    assert 0.05 < float(matrix.view(torch.bfloat16).float().std()) < 0.08
    assert torch.equal(norm.view(torch.float32), torch.ones(256))
    assert len(codes.unique()) == 256
    wide = scales.view(torch.float16).float()
    assert bool((wide > 0).all()) and 0.01 < float(wide.mean()) < 0.02
    assert torch.equal(constant, table)
    assert bool(torch.isfinite(floats.view(torch.float8_e4m3fn).float()).all())
    with pytest.raises(ValueError, match="no random values for the dtype c64"):
        fill_parameter(memory, "x", "c64", 1)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f8e4m3", "i8", "f32"])
def test_random_states(dtype: str) -> None:
    part = torch.zeros(1 << 12, dtype=torch.uint8)
    fill_state(part, dtype)
    assert len(part.unique()) > 50
    if dtype == "f8e4m3":
        assert bool(torch.isfinite(part.view(torch.float8_e4m3fn).float()).all())


def test_inputs_of_a_step() -> None:
    batch = make_batch(DECODE, block_size=16, vocabulary=199)
    assert batch.dims == (2, 2, 2, 2) and seen_blocks(DECODE, 16) == range(2)
    assert batch.positions.tolist() == [20, 20]
    assert batch.slot_mapping.tolist() == [16 * batch.block_tables[i, 1] + 4 for i in range(2)]
    assert len(np.unique(batch.block_tables)) == 4
    batch = make_batch(PREFILL, block_size=16, vocabulary=199)
    assert batch.dims == (24, 1, 2, 1) and batch.logit_rows.tolist() == [23]
    assert len(np.unique(batch.slot_mapping)) == 24
    batch = make_batch(DECODE, block_size=16, vocabulary=199, groups=(FULL, LayerGroup("window_4", 4)))
    tables = batch.others["block_tables_window_4"]
    assert tables.shape == (2, 2) and sorted(tables[:, 1]) == [0, 1], "the first block is before the window"
    assert batch.others["slot_mapping_window_4"].tolist() == (16 * tables[:, 1] + 4).tolist()


def test_what_is_there_may_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr("benchmarks.gpu.prepare.compile_setup", lambda setup, folder: made.append(setup.name))
    (tmp_path / DECODE.setup.name).mkdir()
    (tmp_path / DECODE.setup.name / "manifest.json").write_text("{}")
    other = Row("decode", Setup("1b", "int8", "fp8"), batch=1, context=1024)
    prepare(tmp_path, [DECODE, PREFILL, other], lambda text: None, missing=True)
    assert made == ["m1b_int8_fp8"]
    prepare(tmp_path, [DECODE, PREFILL, other], lambda text: None)
    assert made[1:] == ["m8b_bf16_bf16", "m1b_int8_fp8"]


def test_no_kernel_is_compiled_twice() -> None:
    asked: list[list[str]] = []

    def compiler(sources: Any, variant: Any) -> Any:
        asked.append([source.name for source in sources])
        return {source.name: f"{source.name} for {variant.name}" for source in sources}

    sources = [KernelSource(name, "", (), ()) for name in "cab"]
    variant = next(iter(GPU_VARIANTS.values())) if isinstance(GPU_VARIANTS, dict) else GPU_VARIANTS[0]
    remembering = Remembering(compiler)
    assert list(remembering(sources[:2], variant)) == ["a", "c"]
    assert remembering(sources, variant)["b"] == f"b for {variant.name}"  # type: ignore[comparison-overlap]
    assert asked == [["c", "a"], ["b"]] and remembering.compiled == 3
