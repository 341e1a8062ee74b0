"""`llmc run`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from llmc.commands.common import Json, Package, print_json
from llmc.packages import open_package

EXAMPLE = 'llmc run picocode -p "def main():" -n 32'


def command(
    package: Package,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("-n", "--max-new-tokens", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option()] = None,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Generate text with a package; it streams to standard output."""
    model = open_package(package).load(threads=threads)
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    if chat or as_json:
        messages = [{"role": "user", "content": prompt}]
        completion = model.chat(messages, **sampling) if chat else model.generate(prompt, **sampling)
        if as_json:
            done = {
                "text": completion.text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
            }
            print_json(done)
        else:
            typer.echo(completion.text)
        return
    pieces = model.stream(prompt, **sampling)
    first = next(pieces, "")  # before anything is printed: this is where a bad argument is refused
    typer.echo(f"{prompt}{first}", nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()
