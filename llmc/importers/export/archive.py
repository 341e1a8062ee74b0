"""The `.pt2` archive: a zip whose members are stored as they are. Hostile data: no pickle is read, no size trusted.

Layout (torch/export/pt2_archive, archive version 0): `NAME/models/model.json` is the program, `NAME/data/weights/` and
`NAME/data/constants/` hold raw little-endian tensors and a JSON each that gives their types, sizes and strides.
"""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmc.importers.json_file import ImportFailure, check_regular, parse_json
from llmc.ir.op import Array
from llmc.ir.types import DType

MAX_PROGRAM_BYTES = 256 << 20
MAX_TABLE_BYTES = 64 << 20
MAX_MEMBERS = 1 << 18
MAX_RANK = 16
MAX_SIZE = 1 << 48

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")

DTYPES = {
    1: DType.U8,
    2: DType.I8,
    4: DType.I32,
    5: DType.I64,
    6: DType.F16,
    7: DType.F32,
    8: DType.F64,
    12: DType.BOOL,
    13: DType.BF16,
}
"""Element types by their numbers in the archive (torch/_export/serde/schema.py, ScalarType)."""


class ExportFailure(ImportFailure):
    """A torch.export archive cannot be imported; names the file, the place in it, and what was expected."""


@dataclass(frozen=True)
class ArchivedTensor:
    """A tensor in the archive: elements at `strides` (in elements) of its member's bytes from `offset` on."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    data: memoryview
    member: str

    @property
    def content(self) -> tuple[object, ...]:
        """What tensors share that are one (tied weights): the same elements of the same member."""
        return self.member, self.dtype, self.shape, self.strides, self.offset

    def load(self) -> Array:
        """The tensor in row-major order, read-only over the mapped file where it lies there so."""
        flat = np.frombuffer(self.data[: len(self.data) // self.dtype.itemsize * self.dtype.itemsize], self.dtype.numpy)
        steps = tuple(s * self.dtype.itemsize for s in self.strides)
        array = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, steps, writeable=False)
        return array if array.flags.aligned and array.flags.c_contiguous else np.ascontiguousarray(array)


class Archive:
    """An opened archive. Nothing is read but its table of contents."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path)
        try:
            with path.open("rb") as file:
                self._bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            with zipfile.ZipFile(path) as contents:
                members = contents.infolist()
        except OSError as error:
            raise ExportFailure(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, NotImplementedError, struct.error, zipfile.BadZipFile, RuntimeError) as error:
            raise ExportFailure(f"{path} is truncated or no torch.export archive (a zip): {error}") from error
        if len(members) > MAX_MEMBERS:
            raise ExportFailure(f"{path} has {len(members)} members, at most {MAX_MEMBERS} are read")
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in members:
            name = member.filename.partition("/")[2]
            if name in self._members:
                raise ExportFailure(f"{path} has the member {name[:200]!r} twice")
            self._members[name] = member
        self._check_kind()

    def _check_kind(self) -> None:
        stated = {name: bytes(self.member(name, 64)) for name in ("archive_format", "byteorder") if name in self}
        if stated.get("archive_format") != b"pt2":
            older = "serialized_exported_program.json" in {m.rpartition("/")[2] for m in self._members}
            hint = "it is of an older torch; save it again with torch 2.8 or later" if older else "its format is no pt2"
            raise ExportFailure(f"{self.path} is no archive of torch.export.save: {hint}")
        if stated.get("byteorder", b"little") != b"little":
            raise ExportFailure(f"{self.path}: the byte order must be little, given {stated['byteorder']!r:.40}")

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def member(self, name: str, limit: int | None = None) -> memoryview:
        """The bytes of a member, in the mapped file; at most `limit` are accepted."""
        info = self._members.get(name)
        if info is None:
            raise ExportFailure(f"{self.path} is damaged: it has no member {name[:200]!r}")
        where = f"{self.path}, member {name[:200]!r}"
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise ExportFailure(f"{where}: it is compressed or encrypted; torch.export.save stores members as they are")
        if limit is not None and info.file_size > limit:
            raise ExportFailure(f"{where}: it has {info.file_size} bytes, at most {limit} are read")
        start = info.header_offset
        header = self._bytes[start : start + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size or bytes(header[:4]) != b"PK\x03\x04":
            raise ExportFailure(f"{where}: no member begins at {start}: the archive is damaged")
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start += _LOCAL_HEADER.size + name_length + extra_length
        data = self._bytes[start : start + info.file_size]
        if len(data) < info.file_size:
            raise ExportFailure(f"{where}: it has {len(data)} of {info.file_size} bytes: the archive is truncated")
        return data

    def json(self, name: str, limit: int) -> dict[str, Any]:
        """A member that is a JSON object; its checksum must be right."""
        data = self.member(name, limit)
        if zlib.crc32(data) != self._members[name].CRC:
            raise ExportFailure(f"{self.path}, member {name!r}: its checksum is wrong: the archive is damaged")
        return parse_json(bytes(data), f"{self.path}, member {name!r}")

    def program(self) -> dict[str, Any]:
        """The one model's program."""
        names = [n for n in self._members if n.startswith("models/") and n.endswith(".json")]
        if len(names) != 1:
            raise ExportFailure(f"{self.path} must hold one model, given {len(names)}: {', '.join(names[:5])[:200]}")
        return self.json(names[0], MAX_PROGRAM_BYTES)

    def tensors(self, kind: str) -> dict[str, ArchivedTensor]:
        """Tensors by qualified name; `kind` is `weights` (parameters, saved buffers) or `constants`."""
        folder = f"data/{kind}"
        names = [n for n in self._members if n.startswith(f"{folder}/") and n.endswith("_config.json")]
        found: dict[str, ArchivedTensor] = {}
        for name in names:
            table = self.json(name, MAX_TABLE_BYTES).get("config")
            if not isinstance(table, dict):
                raise ExportFailure(f"{self.path}, member {name!r}: 'config' must be an object, tensor name -> entry")
            found |= {key: self._tensor(key, entry, folder) for key, entry in table.items()}
        return found

    def _tensor(self, name: str, entry: Any, folder: str) -> ArchivedTensor:
        where = f"{self.path}, tensor {name[:200]!r}"
        try:
            meta, member, pickled = entry["tensor_meta"], entry["path_name"], entry["use_pickle"]
            number = meta["dtype"]
            shape, strides = (tuple(d["as_int"] for d in meta[k]) for k in ("sizes", "strides"))
            offset = meta["storage_offset"]["as_int"]
        except (KeyError, TypeError) as error:
            raise ExportFailure(f"{where}: an entry lacks {str(error)[:80]}, given {str(entry)[:200]}") from None
        if pickled is not False or not isinstance(member, str):
            raise ExportFailure(
                f"{where}: it is stored as a pickle, which can run any code and is never read; save the program with"
                " plain tensors (no subclasses, on the CPU)"
            )
        if type(number) is not int or number not in DTYPES:
            known = ", ".join(f"{n} ({t})" for n, t in DTYPES.items())
            raise ExportFailure(f"{where}: the element type {number!r:.40} is not supported; known: {known}")
        dtype = DTYPES[number]
        sizes = (*shape, *strides, offset)
        if len(shape) != len(strides) or len(shape) > MAX_RANK or not all(type(n) is int for n in sizes):
            raise ExportFailure(f"{where}: sizes and strides must be as many integers, given {str(meta)[:200]}")
        if not all(0 <= n < MAX_SIZE for n in sizes) or math.prod(shape) >= MAX_SIZE:
            raise ExportFailure(f"{where}: {dtype}{list(shape)} with strides {list(strides)} is absurd")
        data = self.member(f"{folder}/{member}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if math.prod(shape) else -1
        if (last + 1) * dtype.itemsize > len(data) or offset * dtype.itemsize > len(data):
            needed = (last + 1) * dtype.itemsize
            raise ExportFailure(f"{where}: {dtype}{list(shape)} takes {needed} bytes, its member has {len(data)}")
        if 0 in strides and math.prod(shape) * dtype.itemsize > len(data):
            raise ExportFailure(f"{where}: {dtype}{list(shape)} repeats its elements by strides {list(strides)}")
        return ArchivedTensor(name, dtype, shape, strides, offset, data, f"{folder}/{member}")
