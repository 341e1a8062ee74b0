"""Arguments that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

error_console = Console(stderr=True, highlight=False)

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A Hugging Face folder, a configuration ending in .json, or a torch.export .pt2."
    ),
]
Package = Annotated[Path, typer.Argument(metavar="DIR", help="A package that 'llmc compile' wrote.")]
Architecture = Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Your own model description.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]


def print_json(data: Any) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(data, sort_keys=True))
