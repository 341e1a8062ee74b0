"""From a package's folder to a `Model`: everything is read and checked here, once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .arguments import flag, integer
from .chat import ChatTemplate, special_tokens, template_source
from .cuda_load import load_cuda, wanted_ordinal
from .document import Field, read_document
from .errors import ModelError
from .executor import NativeExecutor
from .manifest import Manifest, read_manifest
from .model import Model
from .native import NativeLibrary
from .plan import read_plan
from .processor import check_machine, choose_variant, this_libc, this_processor
from .tokenizer import Tokenizer, load_tokenizer

_MAX_THREADS = 1024


def load_model(
    folder: Path,
    threads: int | None = None,
    device: str | None = None,
    huge_pages: bool = False,
    check: bool = False,
) -> Model:
    """Load the package in `folder`.

    `threads`: how many, None for as many as this process may use. `device`: None or `cpu`; `cpu:VARIANT` forces one of
    the package's variants; for a package that runs on GPUs `cuda:N`, None and `cuda` being the first.
    `huge_pages`: copy the weights into memory with huge pages instead of mapping their file. `check`: hash the weights
    too; the other files are always hashed. Raises `ModelError` for a package that is damaged or made for another
    machine, `ValueError` for a bad argument.
    """
    threads = 0 if threads is None else integer("threads", threads, 1, _MAX_THREADS, or_none=True)
    huge_pages, check = flag("huge_pages", huge_pages), flag("check", check)
    manifest = read_manifest(folder)
    if manifest.target == "cuda":
        return _load_on_gpu(manifest, wanted_ordinal(device), threads, huge_pages, check)
    wanted = _wanted_variant(device, manifest)
    check_machine(manifest, os.uname().machine, this_libc())
    variant = choose_variant(manifest.variants, this_processor(), wanted)
    manifest.check_files(weights=check)
    weights_bytes = manifest.files[variant.weights].bytes
    plan = read_plan(manifest.path("plan.json"), weights_bytes)
    tokenizer, template = _text_side(manifest)
    checks = _checks(manifest)
    library = NativeLibrary(manifest.path(variant.kernels), threads)
    longest = manifest.model.max_sequence_length
    executor = NativeExecutor(
        plan,
        library,
        manifest.path(variant.weights),
        weights_bytes,
        manifest.model.vocab_size,
        -(-longest // plan.block_size),
        huge_pages,
    )
    loaded = {"variant": variant.name, "threads": library.threads, "build": library.build}
    info: dict[str, Any] = {**manifest.raw, "kernels": list(plan.kernels), "loaded": loaded}
    return Model(executor, manifest.model, tokenizer, template, checks, info)


def _load_on_gpu(manifest: Manifest, ordinal: int, threads: int, huge_pages: bool, check: bool) -> Model:
    for name, given in (("threads", threads), ("huge_pages", huge_pages)):
        if given:
            raise ValueError(f"{name}: given {given}, expected nothing: the package {manifest.name!r} runs on a GPU")
    check_machine(manifest, os.uname().machine, this_libc())
    manifest.check_files(weights=check)
    tokenizer, template = _text_side(manifest)
    checks = _checks(manifest)
    executor, loaded = load_cuda(manifest, ordinal)
    info: dict[str, Any] = {**manifest.raw, "kernels": list(executor.plan.kernels), "loaded": loaded}
    return Model(executor, manifest.model, tokenizer, template, checks, info)


def _checks(manifest: Manifest) -> Field | None:
    return read_document(manifest.path("checks.json")) if manifest.has("checks.json") else None


def _wanted_variant(device: Any, manifest: Manifest) -> str | None:
    if manifest.target != "cpu":
        raise ModelError(
            f"the package {manifest.name!r} is for {manifest.target!r}; this runtime runs packages for 'cpu' and 'cuda'"
        )
    if device is None or device == "cpu":
        return None
    if isinstance(device, str) and device.startswith("cpu:"):
        return device.removeprefix("cpu:")
    raise ValueError(f"device: given {device!r}, expected None, 'cpu' or one of {_variant_names(manifest)}")


def _variant_names(manifest: Manifest) -> list[str]:
    return [f"cpu:{variant.name}" for variant in manifest.variants]


def _text_side(manifest: Manifest) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """The tokenizer and the chat template, where the package has them."""
    if not manifest.has("tokenizer.json"):
        return None, None
    config = read_document(manifest.path("tokenizer_config.json")) if manifest.has("tokenizer_config.json") else None
    model = manifest.model
    tokenizer = load_tokenizer(manifest.path("tokenizer.json"), model.bos_token_id, model.add_bos)
    file = None
    if manifest.has("chat_template.jinja"):
        path = manifest.path("chat_template.jinja")
        try:
            file = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} is no UTF-8 text: {error}") from error
    source = template_source(file, config)
    return tokenizer, None if source is None else ChatTemplate(source, special_tokens(config))
