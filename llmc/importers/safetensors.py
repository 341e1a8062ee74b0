"""Safetensors files: a strict, lazy reader. The header is hostile data; no size in it is trusted.

Format: u64 header length, a JSON object name -> {dtype, shape, data_offsets}, then the tensors' bytes without gaps.
The `safetensors` package is not used because tensors must stay on disk until they are packed.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from llmc.importers.json_file import ImportFailure, check_regular, parse_json, read_json
from llmc.ir.op import Array
from llmc.ir.types import DType

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
MAX_INDEX_BYTES = 64 << 20
MAX_RANK = 16

_WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx")

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
DTYPES = {t.name: t for t in DType}
"""Element types that llmc has, by the format's names."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its name, element type (the format's word), shape, and bytes on disk."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def load(self) -> Array:
        """The tensor as a read-only array over the mapped file (a copy where the file does not align it)."""
        kind = DTYPES[self.dtype].numpy
        array = np.frombuffer(self.data, dtype=kind).reshape(self.shape)
        return array if array.flags.aligned else array.copy()


class SafetensorsFile(Mapping[str, StoredTensor]):
    """An opened file: tensor name -> `StoredTensor`. Nothing but the header is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path)
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if size < 8:
                    raise ImportFailure(f"{path} is truncated: it has {size} bytes, the header's length alone takes 8")
                self._bytes = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise ImportFailure(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        (length,) = struct.unpack_from("<Q", self._bytes)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ImportFailure(
                f"{path} is truncated or no safetensors file: its header claims {length} bytes;"
                f" the file has {size}, and a header at most {MAX_HEADER_BYTES}"
            )
        header = parse_json(bytes(self._bytes[8 : 8 + length]), f"the header of {path}")
        header.pop("__metadata__", None)
        data = self._bytes[8 + length :]
        self._tensors = {name: self._tensor(name, entry, data) for name, entry in header.items()}
        self._check_layout(header, len(data))

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _tensor(self, name: str, entry: Any, data: memoryview) -> StoredTensor:
        where = f"{self.path}, tensor {name[:200]!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ImportFailure(f"{where}: an entry has dtype, shape and data_offsets; given {str(entry)[:200]}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise ImportFailure(f"{where}: the dtype {str(dtype)[:80]!r} is unknown; known: {', '.join(sorted(_BITS))}")
        if not _sizes(shape) or len(shape) > MAX_RANK:
            raise ImportFailure(f"{where}: the shape must be at most {MAX_RANK} sizes, given {str(shape)[:200]}")
        if not _sizes(offsets) or len(offsets) != 2:
            raise ImportFailure(f"{where}: data_offsets must be two positions, given {str(offsets)[:200]}")
        start, end = offsets
        if not start <= end <= len(data):
            raise ImportFailure(
                f"{where}: its data lies at {start} to {end}, and the file has {len(data)} bytes of data:"
                " it is truncated"
            )
        bits = math.prod(shape) * _BITS[dtype]
        if bits % 8 or bits // 8 != end - start:
            raise ImportFailure(
                f"{where}: {dtype}{shape} takes {bits / 8:g} bytes, its data_offsets give {end - start}"
            )
        return StoredTensor(self.path, name, dtype, tuple(shape), data[start:end])

    def _check_layout(self, header: Mapping[str, Any], size: int) -> None:
        """The tensors fill the data exactly: no overlap, no gap, nothing behind."""
        position, previous = 0, "the start"
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            if start != position:
                what = "overlaps" if start < position else "leaves a gap after"
                raise ImportFailure(
                    f"{self.path}, tensor {name!r}: its data at {start} {what} {previous} (to {position})"
                )
            position, previous = end, repr(name)
        if position != size:
            raise ImportFailure(f"{self.path}: {size - position} bytes follow the last tensor's data")


def open_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return dict(SafetensorsFile(single))
    if not index.exists():
        others = sorted(p.name for p in folder.iterdir() if p.suffix in _WEIGHT_FILES)
        raise ImportFailure(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json"
            f" (other weights: {', '.join(others[:5]) or 'none'}); --random-weights compiles without weights"
        )
    weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ImportFailure(f"{index}: 'weight_map' must be an object, tensor name -> file name")
    found: dict[str, StoredTensor] = {}
    for name in sorted({_file_name(value, index) for value in weight_map.values()}):
        shard = SafetensorsFile(folder / name)
        for tensor in shard.values():
            if tensor.name in found:
                raise ImportFailure(f"tensor {tensor.name!r} is in {found[tensor.name].file} and in {tensor.file}")
            if weight_map.get(tensor.name) != name:
                raise ImportFailure(f"{tensor.file} has the tensor {tensor.name!r}, which {index} does not place there")
            found[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in found:
            raise ImportFailure(f"{index} places the tensor {name!r} in {file}, which does not have it")
    return found


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _file_name(value: Any, index: Path) -> str:
    """A shard's name, which must stay in the folder."""
    if not isinstance(value, str) or value in ("", ".", "..") or PurePosixPath(value).name != value or "\0" in value:
        raise ImportFailure(f"{index}: a shard must be the name of a file beside the index, given {str(value)[:80]!r}")
    return value
