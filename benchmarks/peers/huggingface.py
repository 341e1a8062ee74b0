"""A Hugging Face folder of random weights for a config.json: what the other engines convert from."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

TOKEN = "t{}"
"""The text of a token: engines that want text instead of numbers get this."""


def random_folder(config_path: Path, folder: Path) -> Path:
    """Write config.json, weights in bf16 and a tokenizer whose words are `t0 t1 ...`; gives the folder."""
    if (folder / "config.json").exists():
        return folder
    described = json.loads(config_path.read_text())
    config = AutoConfig.for_model(**{k: v for k, v in described.items() if k != "transformers_version"})
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    _tokenizer(config.vocab_size).save_pretrained(partial)
    partial.rename(folder)
    return folder


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({TOKEN.format(i): i for i in range(vocab_size)}, unk_token=TOKEN.format(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": 0, "bos_token": 1, "eos_token": 2, "pad_token": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **{name: TOKEN.format(i) for name, i in names.items()})
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def convert_from_arguments(convert: Callable[[Path, Path, int], Any]) -> None:
    """The command line of a conversion: `CONFIG.json OUT --bits N`; `convert(source, out, bits)` fills a new folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    options = parser.parse_args()
    source = random_folder(options.config, options.out.with_name(options.config.stem + "-huggingface"))
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    convert(source, partial, options.bits)
    partial.rename(options.out)


def folder_bytes(folder: Path, *endings: str) -> int:
    """Bytes of the files with these endings."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.name.endswith(endings))
