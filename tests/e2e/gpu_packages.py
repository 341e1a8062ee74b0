"""Packages for the tests of whole models on a GPU: compiled where the tests run, or beforehand without a GPU by
`python -m tests.e2e.gpu_packages FOLDER`, which a GPU's machine then gets, with `LLMC_TEST_PACKAGES=FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from llmc.driver import compile_model
from llmc.options import CompileOptions
from llmc.packages import open_package
from tests import tiny_models

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}

QUANTIZED: dict[str, dict[str, Any]] = {
    "bf16_fp8": {"kv_quant": "fp8"},
    "q4_int8": {"quant": "q4", "kv_quant": "int8"},
    "q8_bf16": {"quant": "q8"},
    "q4g128_fp8": {"quant": "q4g128", "kv_quant": "fp8"},
    "fp8_bf16": {"quant": "fp8"},
}
"""Options of packages of the model in bf16; `bf16` and `f32` have none."""

PACKAGES = ("f32", "bf16", *QUANTIZED)

PROMPTS = [[5, 700, 33, 1, 8, 99], [42, 7], [999]]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
SAMPLED: list[dict[str, Any]] = [
    {"max_new_tokens": 6, "temperature": 0.9, "seed": 11, "ignore_eos": True, **options}
    for options in ({}, {"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.05, "top_k": 50}, {"repetition_penalty": 1.3})
]


def dtype_of(name: str) -> str:
    """Of the weights of the model that one of `PACKAGES` is made of."""
    return "f32" if name == "f32" else "bf16"


def make_model(dtype: str, folder: Path) -> Path:
    """The model as a Hugging Face folder, with weights in f32 or bf16."""
    model = tiny_models.make_model("llama", **SIZES)
    return tiny_models.save(model.bfloat16() if dtype == "bf16" else model, folder)


def make_package(name: str, model: Path, folder: Path, variant: str) -> Path:
    """One of `PACKAGES` for an architecture such as "sm_90"."""
    compile_model(model, folder / name, CompileOptions(target=f"cuda:{variant}", **QUANTIZED.get(name, {})))
    return folder / name


def tokens(model: Any) -> list[list[list[int]]]:
    """What a loaded package makes of `PROMPTS`: greedily, and with each kind of sampling."""
    prompts = [list(prompt) for prompt in PROMPTS]
    return [[c.token_ids for c in model.generate(prompts, **options)] for options in (GREEDY, *SAMPLED)]


def cpu_tokens(model: Path, folder: Path) -> list[list[list[int]]]:
    """The same of a package for this machine's processor."""
    compile_model(model, folder, CompileOptions())
    with open_package(folder).load() as loaded:
        return tokens(loaded)


def carried() -> Path | None:
    """The folder that was compiled beforehand."""
    folder = os.environ.get("LLMC_TEST_PACKAGES")
    return Path(folder).resolve() if folder else None


def main(folder: Path, variant: str = "sm_90") -> None:
    """Write models, packages, and the tokens that the CPU backend makes."""
    models = {dtype: make_model(dtype, folder / "models" / dtype) for dtype in ("f32", "bf16")}
    for name in PACKAGES:
        make_package(name, models[dtype_of(name)], folder, variant)
    (folder / "tokens.json").write_text(json.dumps(cpu_tokens(models["f32"], folder / "cpu")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
