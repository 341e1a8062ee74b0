"""Reading JSON that others wrote: bounded in size, no duplicate keys, one clear error."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from llmc.ir.errors import LlmcError

MAX_DEPTH = 64


class ImportFailure(LlmcError):
    """A model cannot be imported; names the file, the place in it, what was given and what was expected."""


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file's bytes; `ImportFailure` when it cannot be read or has more than `limit` bytes."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ImportFailure(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise ImportFailure(f"{path} has more than {limit} bytes, the most that is read of such a file")
    return data


def check_regular(path: Path) -> None:
    """Raise `ImportFailure` unless the path is a file that can be opened without waiting (no pipe, no device)."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ImportFailure(f"{path} is no regular file")
    except (OSError, ValueError) as error:  # ValueError: a name that no file system takes
        raise ImportFailure(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A file's JSON object."""
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """A JSON object from bytes. Refuses keys given twice, deep nesting, and any other value.

    `Infinity` and `NaN` are let through: configurations have them, and whoever uses a number checks it.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(items)
        if len(table) < len(items):
            keys = [k for k, _ in items]
            double = next(k for k in keys if keys.count(k) > 1)
            raise ImportFailure(f"{source}: the key {double[:80]!r} stands twice in one object")
        return table

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ImportFailure(f"{source} is no valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ImportFailure(f"{source} must hold a JSON object, given {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [v for c in level for v in (c.values() if isinstance(c, dict) else c) if isinstance(v, dict | list)]
        if not level:
            return value
    raise ImportFailure(f"{source} is nested more than {MAX_DEPTH} deep")
