"""Compiled GPU kernels: what each launch needs (kernels-<arch>.json) and their code (kernels-<arch>.zip)."""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .document import Field, read_document
from .errors import ModelError

MAX_ARGUMENTS = 64
_MAX_KERNELS = 1 << 14
_MAX_SHARED = 1 << 20
_MAX_IMAGE = 1 << 26
"""Bytes of one kernel's code: real ones have some 100 KB."""
_MAX_IMAGES = 1 << 31
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_$.]{0,255}")
_ELF = b"\x7fELF"


@dataclass(frozen=True)
class Kernel:
    """How to launch a kernel: its name in its module, threads of a block, bytes of dynamic shared memory.

    `arguments` counts its pointers, without the two hidden ones at the end. `dependent`: it may start before the kernel
    before it has ended, and waits inside (programmatic dependent launch).
    """

    symbol: str
    function: str
    threads: int
    shared: int
    arguments: int
    dependent: bool


def read_kernels(path: Path) -> dict[str, Kernel]:
    """Read and validate kernels-<arch>.json, by symbol. Raises `ModelError`."""
    return parse_kernels(read_document(path))


def parse_kernels(document: Field) -> dict[str, Kernel]:
    """Validate the kernels; see `read_kernels`."""
    members = document.members()
    if len(members) > _MAX_KERNELS:
        raise ModelError(f"{document.place}: expected at most {_MAX_KERNELS} kernels, found {len(members)}")
    return {symbol: _kernel(symbol, field) for symbol, field in members.items()}


def _kernel(symbol: str, field: Field) -> Kernel:
    function = field.key("function")
    threads = field.key("threads").integer(32, 1024)
    if threads % 32:
        field.key("threads").fail("a multiple of 32")
    for name in (Field(symbol, field.place), function):
        if not _IDENTIFIER.fullmatch(name.text(256)):
            name.fail("a name of letters, digits and underscores")
    return Kernel(
        symbol,
        function.text(256),
        threads,
        field.key("shared").integer(0, _MAX_SHARED),
        field.key("arguments").integer(0, MAX_ARGUMENTS),
        field.key("dependent").boolean(),
    )


def read_images(path: Path, kernels: Mapping[str, Kernel], ptx: bool) -> Iterator[tuple[Kernel, bytes]]:
    """Each kernel with its code from a kernels-<arch>.zip: a cubin, or with `ptx` the text that a driver compiles.

    Raises `ModelError` for an archive that is damaged, lacks a kernel, or unpacks to more than any kernel needs.
    """
    suffix, total = "ptx" if ptx else "cubin", 0
    try:
        with zipfile.ZipFile(path) as archive:
            for symbol, kernel in kernels.items():
                data = _member(archive, path, f"{symbol}.{suffix}")
                total += len(data)
                if total > _MAX_IMAGES:
                    raise ModelError(f"{path} unpacks to more than {_MAX_IMAGES} bytes; the package is damaged")
                if not (_is_text(data) if ptx else data.startswith(_ELF)):
                    raise ModelError(f"{path}: {symbol}.{suffix} is no {suffix}; the package is damaged")
                yield kernel, data
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ArithmeticError, RuntimeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is no archive that this runtime reads: {error}; compile the package again") from error


def _member(archive: zipfile.ZipFile, path: Path, name: str) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ModelError(f"{path} has no {name!r}; the package is damaged, compile it again") from None
    # Other methods bring other errors, and not every Python has them.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ModelError(f"{path}: {name} is neither stored nor deflated; the package is damaged")
    # The size that the archive states may be a lie: what is read is bounded as well.
    with archive.open(info) as file:
        data = file.read(_MAX_IMAGE + 1)
    if len(data) > _MAX_IMAGE:
        raise ModelError(f"{path}: {name} has more than {_MAX_IMAGE} bytes; the package is damaged")
    return data


def _is_text(data: bytes) -> bool:
    """Whether it is PTX as far as that shows: text with a version directive."""
    return b"\0" not in data and b".version" in data
