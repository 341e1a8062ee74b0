"""The command line: parse, call, print. Exit 0 on success, 1 when a check that was asked for fails, 2 on a mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from llmc import __version__
from llmc.bench import bench_package
from llmc.driver import compile_model
from llmc.inspection import inspect
from llmc.ir.errors import LlmcError
from llmc.options import CompileOptions
from llmc.packages import open_package
from llmc.passes.opt import optimize_file
from llmc.report.ledger import print_compile_report
from llmc.report.verification import verify_package

app = typer.Typer(
    name="llmc",
    help="Compile a language model into a standalone Python package.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
err = Console(stderr=True, highlight=False)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or a configuration ending in .json.")]
Package = Annotated[Path, typer.Argument(metavar="DIR", help="A package that 'llmc compile' wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]


def _example(text: str) -> str:
    return f"Example: {text}"


@app.command("compile", epilog=_example("llmc compile examples/picocode -o picocode"))
def compile_command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The package's folder.")],
    name: Annotated[str | None, typer.Option(help="Import name; the folder's name by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a package that is there.")] = False,
    wheel: Annotated[bool, typer.Option("--wheel", help="Also put a wheel beside the package.")] = False,
    target: Annotated[
        str, typer.Option(help="cpu (this machine), cpu:portable, or cpu:VARIANT,VARIANT: x86-64-v3, x86-64-v4.")
    ] = "cpu",
    quant: Annotated[str, typer.Option(help="Weight format: none keeps the checkpoint's dtype.")] = "none",
    kv_quant: Annotated[str | None, typer.Option(help="KV cache dtype: none, f16, bf16, f32.")] = None,
    architecture: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Your own model description.")] = None,
    max_sequence_length: Annotated[int | None, typer.Option(min=1, help="Longest context, in tokens.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="For timing and analysis.")] = False,
    dump_ir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the graph after every pass.")] = None,
    check_numerics: Annotated[bool, typer.Option("--check-numerics", help="Interpret before and after passes.")] = False,
    as_json: Json = False,
) -> None:
    """Compile MODEL into a standalone package."""
    options = CompileOptions(
        target=target,
        name=name,
        quant=quant,
        kv_quant=kv_quant,
        architecture=architecture,
        max_sequence_length=max_sequence_length,
        random_weights=random_weights,
        force=force,
        wheel=wheel,
        dump_ir=dump_ir,
        check_numerics=check_numerics,
    )
    if err.is_terminal and not as_json:
        with err.status("starting") as status:
            report = compile_model(model, output, options, lambda phase: status.update(f"{phase} …"))
    else:
        report = compile_model(model, output, options)
    _print(report.as_json()) if as_json else print_compile_report(report)


@app.command(epilog=_example('llmc run picocode -p "def main():" -n 32'))
def run(
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
            done = {"text": completion.text, "token_ids": completion.token_ids, "finish_reason": completion.finish_reason}
            _print(done)
        else:
            typer.echo(completion.text)
        return
    typer.echo(prompt, nl=False)
    for piece in model.stream(prompt, **sampling):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()


@app.command(epilog=_example("llmc verify picocode --against examples/picocode"))
def verify(
    package: Package,
    against: Annotated[Path | None, typer.Option(metavar="MODEL", help="Compare with this model, node by node.")] = None,
    as_json: Json = False,
) -> None:
    """Check a package against the logits stored in it, and with --against against its source. Exit 1: it differs."""
    report = verify_package(package, against)
    _print(report.as_json()) if as_json else typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command("inspect", epilog=_example("llmc inspect examples/picocode --pass fuse-attention"))
def inspect_command(
    source: Annotated[Path, typer.Argument(metavar="DIR|MODEL", help="A package or a model.")],
    after: Annotated[str | None, typer.Option("--pass", metavar="NAME", help="The graph after this pass.")] = None,
    entry: Annotated[str | None, typer.Option(help="prefill, decode or verify: the lowered entry point.")] = None,
    form: Annotated[str, typer.Option("--format", help="text or dot.")] = "text",
) -> None:
    """Print the graph of a package or a model at any stage."""
    typer.echo(inspect(source, after, entry, form), nl=False)


@app.command(epilog=_example('llmc opt graph.ir -p "canonicalize,fuse-norm"'))
def opt(
    file: Annotated[Path, typer.Argument(metavar="FILE.ir", help="A graph in text form.")],
    passes: Annotated[str, typer.Option("-p", "--passes", help='Passes, such as "canonicalize,fuse-norm".')],
    rewrite_limit: Annotated[int | None, typer.Option(min=0, help="Stop after so many rewrites.")] = None,
    explain: Annotated[str | None, typer.Option(metavar="PASS", help="Say why a pass did not fire.")] = None,
) -> None:
    """Run passes on a graph in text form and print the result."""
    text, explanation = optimize_file(file, passes, rewrite_limit, explain)
    typer.echo(text, nl=False)
    if explanation:
        err.print(explanation, markup=False)


@app.command(epilog=_example("llmc bench picocode --prefill 512 --decode 128"))
def bench(
    package: Package,
    prefill: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 512,
    decode: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    depth: Annotated[int, typer.Option(min=0, help="Context before the measured decode.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded together.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Runs, of which the median is shown.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    as_json: Json = False,
) -> None:
    """Time prefill and decode, beside the memory bandwidth measured in the same run."""
    report = bench_package(package, prefill=prefill, decode=decode, depth=depth, batch=batch, repeat=repeat, threads=threads)
    _print(report.as_json()) if as_json else typer.echo(str(report))


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Options before the command."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: mistakes are one message on standard error and exit 2, without a traceback unless --debug."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments)
    except KeyboardInterrupt:
        err.print("llmc: interrupted", markup=False)
        raise SystemExit(130) from None
    except Exception as error:
        if debug or not _is_mistake(error):
            raise
        err.print(f"llmc: {error}", markup=False, soft_wrap=True)
        raise SystemExit(2) from None


def _is_mistake(error: Exception) -> bool:
    """Whether an error is the user's to mend: ours, a package's own, or an argument that a package refused."""
    return isinstance(error, LlmcError | ValueError) or any(c.__name__ == "ModelError" for c in type(error).__mro__)


def _print(data: Any) -> None:
    typer.echo(json.dumps(data, sort_keys=True))
