"""The package on disk: written aside, hashed, then renamed into place, so that nothing half-written is left."""

from __future__ import annotations

import errno
import hashlib
import json
import keyword
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llmc.ir.errors import LlmcError
from llmc.ir.op import Array

FORMAT_VERSION = 3
"""What `llmc.runtime.manifest` reads."""
LAUNCHER = "launcher.so"
"""What starts kernels on a GPU; in a package without it the runtime starts them through ctypes."""
ALIGNMENT = 64
"""Bytes to which every tensor in weights.bin is aligned: a cache line, and the widest vector."""


def check_name(name: str) -> str:
    """The package's import name; raises `LlmcError` unless it is a Python identifier."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise LlmcError(
            f"the package name {name!r} cannot be imported: expected a Python identifier such as my_model;"
            " choose the folder's name or --name so"
        )
    return name


def to_json(data: Any) -> bytes:
    """Canonical JSON: sorted keys, no float that is not a number."""
    return (json.dumps(data, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


class PackageWriter:
    """Writes files into a folder beside the destination; `finish` puts the manifest in and renames the whole.

    Used as a context manager: leaving it without `finish` (an error, an interrupt, a full disk) removes everything.
    """

    def __init__(self, destination: Path, force: bool = False) -> None:
        self.destination = destination.absolute()
        self.force = force
        self.files: dict[str, dict[str, Any]] = {}
        self.folder: Path | None = None

    def __enter__(self) -> PackageWriter:
        parent, name = self.destination.parent, self.destination.name
        if self.destination.is_symlink() or self.destination.exists():
            self._check_replaceable()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=parent))
            self.folder.chmod(0o755)
        except OSError as error:
            raise LlmcError(f"cannot write to {parent}: {error.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._write_error(error) from error

    def require_space(self, size: int) -> None:
        """Raise `LlmcError` when the disk cannot hold `size` bytes more: better now than after an hour of packing."""
        assert self.folder is not None
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise LlmcError(
                f"the weights need {size / 1e9:.1f} GB and the disk that holds {self.destination.parent} has"
                f" {free / 1e9:.1f} GB free"
            )

    def write(self, name: str, data: bytes) -> None:
        """One small file."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self._record(name, hashlib.sha256(data).hexdigest(), len(data))

    def write_tensors(
        self, name: str, tensors: Iterable[tuple[str, Callable[[], Array]]]
    ) -> dict[str, tuple[int, int]]:
        """Tensors one after another, each evaluated when its turn comes; gives (offset, bytes) by tensor name."""
        placed: dict[str, tuple[int, int]] = {}
        digest, end = hashlib.sha256(), 0
        with self._path(name).open("wb") as file:
            for tensor, evaluate in tensors:
                data = np.ascontiguousarray(evaluate()).reshape(-1).view(np.uint8).data
                padding = bytes(-end % ALIGNMENT)
                for part in (padding, data):
                    file.write(part)
                    digest.update(part)
                placed[tensor] = (end + len(padding), len(data))
                end += len(padding) + len(data)
        self._record(name, digest.hexdigest(), end)
        return placed

    def place_tensors(self, name: str, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Where `write_tensors` would put tensors of these sizes in bytes; no file is written."""
        placed: dict[str, tuple[int, int]] = {}
        end = 0
        for tensor, size in sizes.items():
            start = end + -end % ALIGNMENT
            placed[tensor] = (start, size)
            end = start + size
        self.files[name] = {"bytes": end}
        return placed

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, then put the folder in place (of the old package, with `force`)."""
        assert self.folder is not None
        complete = {**manifest, "format_version": FORMAT_VERSION, "files": self.files}
        self._path("manifest.json").write_bytes(to_json(complete))
        old: Path | None = None
        if self.destination.exists():
            self._check_replaceable()
            old = Path(tempfile.mkdtemp(prefix=f".{self.destination.name}.old.", dir=self.destination.parent))
            self.destination.replace(old)
        self.folder.replace(self.destination)
        self.folder = None
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name

    def _record(self, name: str, digest: str, size: int) -> None:
        self.files[name] = {"sha256": digest, "bytes": size}

    def _check_replaceable(self) -> None:
        if not self.force:
            raise LlmcError(f"{self.destination} exists: choose another folder, or replace it with --force")
        package = (self.destination / "manifest.json").is_file()
        if self.destination.is_symlink() or not self.destination.is_dir():
            raise LlmcError(f"{self.destination} is not a folder; --force replaces packages only")
        if not package and any(self.destination.iterdir()):
            raise LlmcError(
                f"{self.destination} holds something that is no llmc package; --force replaces packages only"
            )

    def _write_error(self, error: OSError) -> LlmcError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return LlmcError(f"the disk that holds {self.destination.parent} is full: nothing was left there")
        return LlmcError(f"cannot write the package {self.destination}: {error.strerror or error}")
