"""`llmc compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmc.commands.common import Architecture, Json, Model, error_console, print_json
from llmc.driver import compile_model
from llmc.ir.quant import FORMATS
from llmc.ir.target import GPU_VARIANTS
from llmc.options import CPU_KV_DTYPES, CompileOptions
from llmc.report.ledger import print_compile_report

EXAMPLE = "llmc compile examples/picocode -o picocode"


def _gpu_formats() -> str:
    """The formats that no CPU target takes, with their bits."""
    named = [f"{f.name} {f.bits_per_weight:g}" for f in FORMATS.values() if not f.integer_products]
    return f"GPU only: {', '.join(named)}"


def command(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The package's folder.")],
    name: Annotated[
        str | None,
        typer.Option(help="Import name of the wheel. A folder is imported by its own name, which is the default."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a package that is there.")] = False,
    wheel: Annotated[bool, typer.Option("--wheel", help="Also put a wheel beside the package.")] = False,
    target: Annotated[
        str,
        typer.Option(
            help="cpu (this machine), cpu:portable, or cpu:VARIANT,VARIANT: x86-64-v3, x86-64-v4, avx512-vnni,"
            " avx512-bf16; or cpu:aarch64. Only by its name: avx512-bf16, which is faster with bf16 weights but rounds"
            f" activations to bf16 too. Or cuda:ARCHITECTURE,…, on any machine: {', '.join(GPU_VARIANTS)}."
        ),
    ] = "cpu",
    quant: Annotated[
        str,
        typer.Option(
            metavar=f"none|{'|'.join(FORMATS)}|FILE.toml",
            help="Weight format: none keeps the checkpoint's dtype, q8 takes 8.5 bits a weight, q4 4.5."
            f" {_gpu_formats()}. A file gives one each to format (all linears), lm_head and embedding; a tied embedding"
            " is like the lm_head, others are kept by default.",
        ),
    ] = "none",
    kv_quant: Annotated[
        str | None, typer.Option(help=f"KV cache dtype: none, {', '.join(CPU_KV_DTYPES)}; GPU only: fp8.")
    ] = None,
    architecture: Architecture = None,
    max_sequence_length: Annotated[int | None, typer.Option(min=1, help="Longest context, in tokens.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="For timing and analysis.")] = False,
    dump_ir: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write the graph after every pass.")] = None,
    check_numerics: Annotated[
        bool, typer.Option("--check-numerics", help="Interpret before and after passes.")
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Choose how products are cut into tiles by measuring, on a GPU of this machine that the target names:"
            " about a minute, and the time to compile what is tried. Without it a model of the GPU chooses.",
        ),
    ] = False,
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
        tune=tune,
    )
    if error_console.is_terminal and not as_json:
        with error_console.status("starting") as status:
            report = compile_model(model, output, options, lambda phase: status.update(f"{phase} …"))
    else:
        report = compile_model(model, output, options)
    print_json(report.as_json()) if as_json else print_compile_report(report)
