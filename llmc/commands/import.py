"""`llmc import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmc.commands.common import Architecture, Json, Model, print_json
from llmc.import_report import report_import

EXAMPLE = "llmc import examples/picocode"


def command(
    model: Model,
    architecture: Architecture = None,
    max_sequence_length: Annotated[int | None, typer.Option(min=1, help="Longest context, in tokens.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Do not read weights.")] = False,
    dump: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the graph after every pass.")] = None,
    as_json: Json = False,
) -> None:
    """Print what is recognised in MODEL, what it is raised to, and what is not and why. Nothing is compiled."""
    report = report_import(model, architecture, max_sequence_length, random_weights, dump)
    if as_json:
        print_json(report.as_json())
    else:
        typer.echo(str(report))
