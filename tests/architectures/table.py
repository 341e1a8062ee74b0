"""The tables of docs/architectures.md: what blocks there are, and what each family is made of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llmc.architectures import loader
from llmc.architectures.blocks import ROLES
from llmc.architectures.context import Block
from llmc.architectures.model import Embedding, Head, Model
from tests.fixtures import REPOSITORY

PAGE = REPOSITORY / "docs" / "architectures.md"
FOLDER = Path(loader.__file__).parent

_INTRODUCTION = (
    "In parentheses a block's fields: in brackets what may be left out, with its default, if it has one, and after `or`"
    " the other texts that it may be. `rope` is read from the configuration and stands in no table. Ops that are named"
    " here are described in `llmc/ir/ops/`."
)


def blocks() -> str:
    """Every kind of block: its fields, and what it says of itself."""
    text = [_INTRODUCTION]
    for name, part in (("embedding", Embedding), ("head", Head)):
        text += [f"### {name}", f"({_fields(part)}) {_document(part)}"]
    for role, base in ROLES.items():
        text += [f"### {role}", _document(base)]
        shared: dict[Any, list[str]] = {}
        for kind, block in sorted(base.kinds.items()):
            for parent in block.__mro__[1:]:
                if is_dataclass(parent):
                    shared.setdefault(parent, []).append(f"`{kind}`")
            text.append(f"**`{kind}`** ({_fields(block)}). {_document(block)}")
        text += [f"Of {' and '.join(kinds)}: {_document(parent)}" for parent, kinds in shared.items()]
    return "\n\n".join("\n".join(wrap(part, 120)) for part in text)


def _document(block: type) -> str:
    return " ".join((block.__doc__ or "").split())


def family_row(name: str, model_type: str, model: Model, error: str) -> str:
    """A line of the families' table."""
    source = loader.descriptions()[model_type].source
    lines = len((FOLDER / source).read_text(encoding="utf-8").splitlines())
    kinds = ", ".join(f"`{kind}`" for kind in dict.fromkeys(_kinds(model)))
    return f"| {name} | `{source}` | {kinds} | {lines} | {error} |"


FAMILY_HEAD = "| family | description | blocks | lines | error |\n|---|---|---|---|---|"


def section(title: str) -> list[str]:
    """The lines of a section's table; prose may begin with a bar too."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {title}\n", 1)[1].split("\n#", 1)[0]
    return [line for line in text.splitlines() if line.startswith(("| ", "|-"))]


def rewrite(title: str, table: str) -> None:
    """Put a table in a section's place for it."""
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(f"## {title}\n", 1)
    body, mark, tail = rest.partition("\n#")
    kept = [p for p in body.strip("\n").split("\n\n") if p and not p.startswith("|")]
    PAGE.write_text(f"{head}## {title}\n\n" + "\n\n".join([*kept, table]) + "\n" + mark + tail, encoding="utf-8")


def blocks_of_page() -> str:
    """The section on blocks that the page has."""
    text = PAGE.read_text(encoding="utf-8")
    return text.split("## The blocks\n", 1)[1].split("\n## ", 1)[0].strip("\n")


def rewrite_blocks() -> None:
    """Put the section on blocks anew."""
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split("## The blocks\n", 1)
    tail = rest.partition("\n## ")[2]
    PAGE.write_text(f"{head}## The blocks\n\n{blocks()}\n\n## {tail}", encoding="utf-8")


def rows_by_family() -> Mapping[str, str]:
    """The families' rows that the page has, by name."""
    return {line.split("|")[1].strip(): line for line in section("The families")[2:]}


def _fields(block: Any) -> str:
    """What a block's table may say: in brackets what may be left out, with its default and the other choices."""
    hints = get_type_hints(block)
    return ", ".join(_shown(field, hints[field.name]) for field in fields(block))


def _shown(field: Any, hint: Any) -> str:
    if field.default is MISSING:
        return str(field.name)
    if not isinstance(field.default, bool | int | float | str) or field.default == "":
        return f"[{field.name}]"
    others = [choice for choice in get_args(hint) if choice != field.default] if get_origin(hint) is Literal else []
    return f"[{field.name} = {' or '.join(json.dumps(choice) for choice in (field.default, *others))}]"


def _kinds(block: Any) -> Iterator[str]:
    names = {cls: kind for role in ROLES.values() for kind, cls in role.kinds.items()}
    if isinstance(block, tuple):
        for part in block:
            yield from _kinds(part)
    if is_dataclass(block) and not isinstance(block, type):
        if isinstance(block, Block) and names[type(block)] != "none":
            yield names[type(block)]
        for field in fields(block):
            yield from _kinds(getattr(block, field.name))
