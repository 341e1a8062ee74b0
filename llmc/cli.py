"""The command line. Exit 0 on success, 1 when a check that was asked for fails, 2 on a user's mistake."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from llmc import __version__
from llmc.commands.common import error_console
from llmc.ir.errors import LlmcError

COMMANDS = ("compile", "import", "run", "verify", "inspect", "opt", "bench")
"""In the order in which --help shows them; each is a module of `llmc.commands`."""


class _Commands(TyperGroup):
    """Commands by name, imported when they are called: `llmc run` needs nothing of the compiler."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str):  # type: ignore[no-untyped-def,override]
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"llmc.commands.{cmd_name}")
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(cmd_name, epilog=f"Example: {module.EXAMPLE}")(module.command)
        return typer.main.get_command(app)


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def llmc(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Compile a language model into a standalone Python package."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: a mistake is one message on standard error, without a traceback unless --debug."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments, prog_name="llmc")
    except KeyboardInterrupt:
        error_console.print("llmc: interrupted", markup=False)
        raise SystemExit(130) from None
    except Exception as error:
        if debug or not _is_mistake(error):
            raise
        error_console.print(f"llmc: {error}", markup=False, soft_wrap=True)
        raise SystemExit(2) from None


def _is_mistake(error: Exception) -> bool:
    """Whether an error is the user's to mend: ours, a package's own, or an argument that a package refused."""
    return isinstance(error, LlmcError | ValueError) or any(c.__name__ == "ModelError" for c in type(error).__mro__)
