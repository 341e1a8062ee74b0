"""`llmc bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from llmc.bench import bench_package
from llmc.commands.common import Json, Package, print_json
from llmc.step_ledger import step_ledger

EXAMPLE = "llmc bench picocode --prefill 512 --decode 128"


def command(
    package: Package,
    prefill: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 512,
    decode: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    depth: Annotated[int, typer.Option(min=0, help="Context before the measured decode.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Runs, of which the median is shown.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    ledger: Annotated[bool, typer.Option("--ledger", help="Show where the time of a decode step goes.")] = False,
    as_json: Json = False,
) -> None:
    """Time prefill and decode, beside the memory bandwidth measured in the same run."""
    if ledger:
        found = step_ledger(package, steps=decode, depth=depth + prefill, batch=batch, repeat=repeat, threads=threads)
        print_json(found.as_json()) if as_json else typer.echo(str(found))
        return
    report = bench_package(
        package, prefill=prefill, decode=decode, depth=depth, batch=batch, repeat=repeat, threads=threads
    )
    print_json(report.as_json()) if as_json else typer.echo(str(report))
