"""JSON files of a package, read as hostile data: every access checks what it takes and names the file and the key."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .errors import ModelError

MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class Field:
    """A value of a JSON document, with its place (`plan.json: buffers[3].offset`) for messages.

    Every method raises `ModelError` when the value is not what its name says.
    """

    value: Any
    place: str

    def fail(self, expected: str) -> NoReturn:
        """Raise a `ModelError` that says what was expected here and what was found."""
        given = repr(self.value)
        shown = given if len(given) <= 80 else given[:77] + "..."
        raise ModelError(f"{self.place}: expected {expected}, found {shown}; the package is damaged, compile it again")

    def key(self, name: str) -> Field:
        """A member that must be there."""
        if name not in self.object():
            raise ModelError(f"{self.place}: {name!r} is missing; the package is damaged, compile it again")
        return self._member(name)

    def optional(self, name: str) -> Field | None:
        """A member, or None where it is absent or null."""
        return None if self.object().get(name) is None else self._member(name)

    def object(self) -> dict[str, Any]:
        """The value as it is, once it is known to be an object."""
        if not isinstance(self.value, dict):
            self.fail("an object")
        return self.value

    def members(self) -> dict[str, Field]:
        """Every member of an object."""
        return {name: self._member(name) for name in self.object()}

    def items(self, length: int | None = None) -> list[Field]:
        """The items of a list, of that length where one is given."""
        if not isinstance(self.value, list) or (length is not None and len(self.value) != length):
            self.fail("a list" if length is None else f"a list of {length} values")
        return [Field(item, f"{self.place}[{i}]") for i, item in enumerate(self.value)]

    def integer(self, least: int, most: int) -> int:
        """An integer in [least, most]."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or not least <= self.value <= most:
            self.fail(f"an integer from {least} to {most}")
        return self.value

    def number(self) -> float:
        """A finite number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            self.fail("a number")
        try:
            number = float(self.value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.fail("a finite number")
        return number

    def text(self, longest: int = 4096) -> str:
        """A string of at most `longest` characters."""
        if not isinstance(self.value, str) or len(self.value) > longest:
            self.fail(f"text of at most {longest} characters")
        return self.value

    def boolean(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            self.fail("true or false")
        return self.value

    def file_name(self) -> str:
        """A path inside the package: relative, with forward slashes, and without a way out of the folder."""
        name = self.text()
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
            self.fail("a relative path inside the package")
        return name

    def _member(self, name: str) -> Field:
        return Field(self.value[name], f"{self.place}{'.' if ':' in self.place else ': '}{name[:80]}")


def read_document(path: Path) -> Field:
    """The JSON object in a file; raises `ModelError` when it is missing, too large or no strict JSON."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_document(data, str(path))


def parse_document(data: bytes, place: str) -> Field:
    """Strict JSON: UTF-8, no key twice, no NaN, an object at the top. Raises `ModelError`."""
    if len(data) > MAX_BYTES:
        raise ModelError(f"{place} is too large: expected at most {MAX_BYTES} bytes")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{place} is no JSON that this runtime reads: {error}; compile the package again") from error
    document = Field(value, place)
    document.object()
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has a key twice")
    return members


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
