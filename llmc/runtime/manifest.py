"""What a package says about itself: manifest.json, checked against the files that it lists."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .document import Field, read_document
from .errors import ModelError

FORMAT_VERSION = 3
"""The format that this runtime was written with; it reads this one and the one before.

Version 3 has groups of layers in plan.json."""

_MAX_VOCABULARY = 1 << 24
_MAX_CONTEXT = 1 << 30
_MAX_COUNT = 1 << 62
_MAX_CAPABILITY = 1 << 10


@dataclass(frozen=True)
class ModelFacts:
    """The model's sizes and special tokens. `max_sequence_length` counts the tokens that a sequence holds."""

    architecture: str
    vocab_size: int
    max_sequence_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool


@dataclass(frozen=True)
class Variant:
    """Kernels for one level of a processor or one architecture of GPUs: files by name, and what the machine must have.

    For a GPU `requires` is empty, `resources` says how to launch the kernels, and `capability` is what they are for:
    exactly that if `exact`, else also what came later.
    """

    name: str
    kernels: str
    weights: str
    requires: tuple[str, ...]
    plan: str = "plan.json"
    resources: str | None = None
    capability: tuple[int, int] | None = None
    exact: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """What it is made of."""
        own = (self.kernels, self.weights)
        return own if self.resources is None else (*own, self.plan, self.resources)


@dataclass(frozen=True)
class FileEntry:
    """A file's size and the hash of its content, as the manifest states them."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """A validated manifest. `raw` is the whole document, for `info`."""

    folder: Path
    name: str
    model: ModelFacts
    target: str
    machine: str | None
    variants: tuple[Variant, ...]
    glibc: tuple[int, ...] | None
    files: Mapping[str, FileEntry]
    raw: Mapping[str, Any]
    launcher: str | None = None

    def path(self, name: str) -> Path:
        """A listed file of the package; raises `ModelError` for one that the manifest does not list."""
        if name not in self.files:
            raise ModelError(f"{self.folder / 'manifest.json'} does not list {name!r}; compile the package again")
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether the package has this file."""
        return name in self.files

    def check_files(self, weights: bool) -> None:
        """Check that every file has its stated size and hash; the weights are hashed only when `weights` is true.

        Raises `ModelError` naming the first file that is missing or altered. A file that the manifest does not list
        (a byte-code cache, say) is no concern of ours.
        """
        large = {variant.weights for variant in self.variants}
        for name, entry in self.files.items():
            path = self.folder / name
            try:
                size = path.stat().st_size
                digest = entry.sha256 if name in large and not weights else _hash(path)
            except OSError as error:
                raise ModelError(
                    f"{path} cannot be read: {error.strerror or error}; the package is incomplete"
                ) from error
            if size != entry.bytes:
                raise ModelError(f"{path} has been altered: expected {entry.bytes} bytes, found {size}")
            if digest != entry.sha256:
                raise ModelError(f"{path} has been altered: expected sha256 {entry.sha256}, found {digest}")


def read_manifest(folder: Path) -> Manifest:
    """Read and validate `folder/manifest.json`. Raises `ModelError` for anything that is not as it should be."""
    document = read_document(folder / "manifest.json")
    check_version(document)
    model, target = document.key("model"), document.key("target")
    files = {
        name: _file_entry(Field(name, field.place), field) for name, field in document.key("files").members().items()
    }
    kind, launcher = target.key("kind").text(), target.optional("launcher")
    variants = tuple(
        _variant(item) if kind != "cuda" else _cuda_variant(item) for item in target.key("variants").items()
    )
    needed = [(f"variant {variant.name!r}", name) for variant in variants for name in variant.files]
    if launcher:
        needed.append(("the launcher", launcher.file_name()))
    for what, name in needed:
        if name not in files:
            raise ModelError(f"{target.place}: {what} needs {name!r}, which 'files' does not list")
    requires = document.optional("requires")
    glibc = requires.optional("glibc") if requires else None
    machine = target.optional("machine")
    return Manifest(
        folder=folder,
        name=document.key("name").text(),
        model=_model(model),
        target=kind,
        machine=machine.text(64) if machine else None,
        variants=variants,
        launcher=launcher.file_name() if launcher else None,
        glibc=_version(glibc) if glibc else None,
        files=files,
        raw=document.object(),
    )


def check_version(document: Field) -> int:
    """The document's format version; a newer one, or one that is too old, is refused by name."""
    version = document.key("format_version").integer(0, 1 << 31)
    if version > FORMAT_VERSION:
        raise ModelError(
            f"{document.place}: format_version {version} is newer than this runtime, which reads "
            f"{FORMAT_VERSION} and the one before; use the runtime that the package was made with"
        )
    if version < FORMAT_VERSION - 1:
        raise ModelError(
            f"{document.place}: format_version {version} is too old for this runtime, which reads "
            f"{FORMAT_VERSION} and the one before; compile the model again"
        )
    return version


def _model(field: Field) -> ModelFacts:
    vocab_size = field.key("vocab_size").integer(1, _MAX_VOCABULARY)
    bos, add_bos = field.optional("bos_token_id"), field.optional("add_bos")
    eos = field.optional("eos_token_ids")
    return ModelFacts(
        architecture=field.key("architecture").text(),
        vocab_size=vocab_size,
        max_sequence_length=field.key("max_sequence_length").integer(1, _MAX_CONTEXT),
        bos_token_id=bos.integer(0, vocab_size - 1) if bos else None,
        eos_token_ids=tuple(item.integer(0, vocab_size - 1) for item in eos.items()) if eos else (),
        add_bos=add_bos.boolean() if add_bos else False,
    )


def _variant(field: Field) -> Variant:
    return Variant(
        name=field.key("name").text(64),
        kernels=field.key("kernels").file_name(),
        weights=field.key("weights").file_name(),
        requires=tuple(item.text(64) for item in field.key("requires").items()),
    )


def _cuda_variant(field: Field) -> Variant:
    major, minor = (item.integer(0, _MAX_CAPABILITY) for item in field.key("capability").items(2))
    exact = field.optional("exact")
    return replace(
        _variant(field),
        plan=field.key("plan").file_name(),
        resources=field.key("resources").file_name(),
        capability=(major, minor),
        exact=exact.boolean() if exact else False,
    )


def _file_entry(name: Field, field: Field) -> FileEntry:
    name.file_name()
    digest = field.key("sha256").text(64)
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        field.key("sha256").fail("64 hexadecimal digits")
    return FileEntry(digest, field.key("bytes").integer(0, _MAX_COUNT))


def _version(field: Field) -> tuple[int, ...]:
    parts = field.text(16).split(".")
    if not all(part.isascii() and part.isdigit() for part in parts):
        field.fail("a version such as 2.28")
    return tuple(map(int, parts))


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
