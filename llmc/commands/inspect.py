"""`llmc inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmc.commands.common import Architecture
from llmc.inspection import inspect

EXAMPLE = "llmc inspect examples/picocode --pass fuse-attention"


def command(
    source: Annotated[Path, typer.Argument(metavar="DIR|MODEL", help="A package or a model.")],
    after: Annotated[str | None, typer.Option("--pass", metavar="NAME", help="The graph after this pass.")] = None,
    entry: Annotated[str | None, typer.Option(help="prefill, decode or verify: the lowered entry point.")] = None,
    architecture: Architecture = None,
    form: Annotated[str, typer.Option("--format", help="text or dot.")] = "text",
) -> None:
    """Print the graph of a package or a model at any stage."""
    typer.echo(inspect(source, after, entry, form, architecture), nl=False)
