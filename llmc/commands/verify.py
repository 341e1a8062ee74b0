"""`llmc verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmc.commands.common import Architecture, Json, Package, print_json
from llmc.report.verification import verify_package

EXAMPLE = "llmc verify picocode --against examples/picocode"


def command(
    package: Package,
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="Compare with this model, node by node.")
    ] = None,
    architecture: Architecture = None,
    as_json: Json = False,
) -> None:
    """Check a package against the logits stored in it, and with --against against its source. Exit 1: it differs."""
    report = verify_package(package, against, architecture)
    print_json(report.as_json()) if as_json else typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)
