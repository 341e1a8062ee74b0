"""`llmc opt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmc.commands.common import error_console
from llmc.passes.opt import optimize_file

EXAMPLE = 'llmc opt graph.ir -p "canonicalize,fuse-norm"'


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE.ir", help="A graph in text form.")],
    passes: Annotated[str, typer.Option("-p", "--passes", help='Passes, such as "canonicalize,fuse-norm".')],
    rewrite_limit: Annotated[int | None, typer.Option(min=0, help="Stop after so many rewrites.")] = None,
    explain: Annotated[str | None, typer.Option(metavar="PASS", help="Say why a pass did not fire.")] = None,
) -> None:
    """Run passes on a graph in text form and print the result."""
    text, explanation = optimize_file(file, passes, rewrite_limit, explain)
    typer.echo(text, nl=False)
    if explanation:
        error_console.print(explanation, markup=False)
