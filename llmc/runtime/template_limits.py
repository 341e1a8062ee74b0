"""The bounds within which a template that nobody has vetted may work, as plain functions on its values.

`template.py` puts them into jinja2. The time is bounded without threads and signals: every operation of a template is
counted, and now and then a look is taken at the clock.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from typing import Any

MAX_TEMPLATE = 1 << 20
MAX_LENGTH = 1 << 22
"""The largest text that a template may make or write, in characters, containers with all that is in them."""
MAX_WRITTEN = 1 << 28
"""The characters of all values that a template makes, together."""
MAX_OPERATIONS = 2_000_000
MAX_SECONDS = 5.0
_MAX_BITS = 1 << 12
_MAX_DEPTH = 64
_MAX_INDENT = 64
_FORMAT_WIDTH = re.compile(r"\{[^{}]*:[^{}]*(\{|\d{4})|%[^%a-zA-Z]*(\*|\d{4})")


class TemplateLimit(Exception):
    """A template has met a bound."""


class Budget:
    """What one rendering has used. `start` begins anew."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin to count."""
        self.operations = self.written = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        """Count an operation."""
        self.operations += 1
        if self.operations > MAX_OPERATIONS:
            raise TemplateLimit(f"takes more than {MAX_OPERATIONS} operations")
        if self.operations % 64 == 0 and time.monotonic() > self.deadline:
            raise TemplateLimit(f"takes longer than {MAX_SECONDS:g} seconds")

    def measured(self, value: Any) -> Any:
        """The value, once it is known to be small enough."""
        self.tick()
        if isinstance(value, int):
            if value.bit_length() > _MAX_BITS:
                raise TemplateLimit("makes a number of more than a thousand digits")
        elif isinstance(value, str | list | tuple | dict):
            self.write(self._expanded(value, {}, 0))
        return value

    def write(self, characters: int) -> None:
        """Count characters that are made, or about to be."""
        self.written += characters
        if characters > MAX_LENGTH or self.written > MAX_WRITTEN:
            raise TemplateLimit(f"makes a value of more than {MAX_LENGTH} characters, or too many values")

    def join(self, separator: Any, items: Iterable[Any]) -> str:
        """`str.join` of the items' texts."""
        parts, length = [], 0
        for item in items:
            parts.append(str(self.measured(item)))
            length += len(parts[-1]) + len(str(separator))
            if length > MAX_LENGTH:
                raise TemplateLimit(f"joins more than {MAX_LENGTH} characters")
        return str(separator).join(parts)

    def check_replace(self, text: Any, old: Any = "", new: Any = "", *rest: Any) -> None:
        """Bound `text.replace(old, new)`."""
        self.write(len(str(text)) + str(text).count(str(old)) * len(str(new)))

    def check_indent(self, text: Any, width: Any = 4, *rest: Any) -> None:
        """Bound the `indent` filter."""
        self.write((str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))

    def check_group(self, items: Any, size: Any = 1, *rest: Any) -> None:
        """Bound the filters `batch` and `slice`."""
        self.write(max(0, int(size)))

    def check_round(self, value: Any, precision: Any = 0, *rest: Any) -> None:
        """Bound the `round` filter, which raises ten to the precision."""
        if not -32 <= precision <= 32:
            raise TemplateLimit("rounds to more than 32 digits")

    def check_sum(self, items: Any, attribute: Any = None, start: Any = 0) -> None:
        """Bound the `sum` filter to numbers: adding lists up takes time that grows with the square."""
        if not isinstance(start, int | float):
            raise TemplateLimit("sums what is no number")

    def check_format(self, text: Any, *rest: Any) -> None:
        """Bound `%` and `str.format`."""
        if isinstance(text, str) and _FORMAT_WIDTH.search(text):
            raise TemplateLimit("formats with a computed or enormous width")

    def check_json(self, value: Any, ensure_ascii: Any = False, indent: Any = None, *rest: Any) -> None:
        """Bound the `tojson` filter."""
        width = len(indent) if isinstance(indent, str) else indent or 0
        if width > _MAX_INDENT:
            raise TemplateLimit(f"indents JSON by more than {_MAX_INDENT}")
        if isinstance(value, list | tuple | dict):
            self.write(self._expanded(value, {}, 0))

    def check_operator(self, operator: str, left: Any, right: Any) -> None:
        """Bound one of `+`, `*`, `**`, `%` before it is done."""
        if operator == "%":
            self.check_format(left)
        elif operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise TemplateLimit("raises to a power above 64")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    self.write(self._expanded(value, {}, 0) * max(times, 0))

    def _expanded(self, value: Any, known: dict[int, int], depth: int) -> int:
        """Characters of the value written out: what it holds twice counts twice. Linear in what is distinct."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, list | tuple | dict):
            return 8
        if depth > _MAX_DEPTH:
            raise TemplateLimit(f"nests more than {_MAX_DEPTH} deep")
        if id(value) not in known:
            if len(value) > 16:
                self.operations += len(value) // 16
            self.tick()
            items: Iterable[Any] = value if not isinstance(value, dict) else [*value.keys(), *value.values()]
            known[id(value)] = 8 + sum(self._expanded(item, known, depth + 1) for item in items)
        return known[id(value)]
