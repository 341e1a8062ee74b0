"""python -m benchmarks.gpu prepare FOLDER | run FOLDER --out OUT | report OUT | predict; of one row, for a profiler,
step FOLDER | counters FOLDER CSV; see benchmarks/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.counters import OPTIONS, compare, planned_launches, read_counters
from benchmarks.gpu.predict import print_predictions
from benchmarks.gpu.report import write_report
from benchmarks.gpu.results import Results
from benchmarks.gpu.rows import Row, all_rows, select
from benchmarks.gpu.supervise import supervise
from benchmarks.gpu.worker import work


def main(arguments: Sequence[str] | None = None) -> int:
    """Gives the exit status."""
    options = _options().parse_args(arguments)
    try:
        return int(COMMANDS[options.command](options) or 0)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def prepare(options: argparse.Namespace) -> None:
    """Compile packages."""
    from benchmarks.gpu.prepare import prepare as compile_packages  # only here is there a compiler

    compile_packages(options.folder, select(all_rows(), options.rows), say, options.missing)


def run(options: argparse.Namespace) -> None:
    """Measure in workers."""
    rows = select(all_rows(), options.rows)
    deadline = time.monotonic() + 60 * options.minutes

    def command(left: Sequence[Row]) -> list[str]:
        seconds = str(deadline - time.monotonic())
        names = ",".join(row.name for row in left)
        here = [sys.executable, "-m", "benchmarks.gpu", "work", str(options.folder), "--out", str(options.out)]
        return [*here, "--scratch", str(options.scratch), "--rows", names, "--seconds", seconds]

    supervise(rows, options.out, deadline, command, say)
    write_report(options.out, None, say)


def work_here(options: argparse.Namespace) -> int:
    """Be a worker."""
    from benchmarks.gpu.lab import TorchLab  # needs torch and a GPU

    deadline = time.monotonic() + options.seconds
    lab = TorchLab(options.folder, options.scratch)
    return work(select(all_rows(), options.rows), Results(options.out), lab, deadline, say)


def step(options: argparse.Namespace) -> None:
    """One step of one row, for a profiler."""
    import torch

    from benchmarks.gpu.package import OpenPackage

    row = _one(options.rows)
    torch.cuda.init()
    package = OpenPackage(options.folder / row.setup.name)
    steps = package.steps(row)
    steps.check()
    with torch.cuda.profiler.profile():
        steps.launch()
    package.close()


def counters(options: argparse.Namespace) -> None:
    """What a profiler saw of it."""
    say(compare(planned_launches(options.folder, _one(options.rows)), read_counters(options.csv)))


def _one(patterns: str | None) -> Row:
    chosen = select(all_rows(), patterns)
    if len(chosen) != 1:
        raise ValueError(f"--rows must choose one row, given {patterns!r}, which chooses {len(chosen)}")
    return chosen[0]


def report(options: argparse.Namespace) -> None:
    """Table and picture of what was measured."""
    write_report(options.out, options.results, say)


def predict(options: argparse.Namespace) -> None:
    """What the model of costs says, before anything is measured."""
    print_predictions(select(all_rows(), options.rows), say)


def say(text: str) -> None:
    """To the terminal, at once: it is a pipe on the machines that this runs on."""
    print(text, flush=True)


COMMANDS = {
    "prepare": prepare,
    "run": run,
    "work": work_here,
    "step": step,
    "counters": counters,
    "report": report,
    "predict": predict,
}


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    rows = argparse.ArgumentParser(add_help=False)
    rows.add_argument("--rows", metavar="PATTERNS", help="such as '8b-*-b1-1k,*-vs-*'; default: all")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("folder", type=Path, help="where the packages are")
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, required=True, help="where gpu.json is written, and read to go on")
    out.add_argument("--scratch", type=Path, default=Path("build/gpu-scratch"), help="disk for files of weights")
    preparer = commands.add_parser("prepare", parents=[folder, rows], help="compile the packages; needs no GPU")
    preparer.add_argument("--missing", action="store_true", help="only those that are not there")
    runner = commands.add_parser("run", parents=[folder, rows, out], help="measure; needs no compiler")
    runner.add_argument("--minutes", type=float, default=9.0, help="no row is begun or goes on after so long")
    worker = commands.add_parser("work", parents=[folder, rows, out], help="what `run` starts")
    worker.add_argument("--seconds", type=float, required=True)
    commands.add_parser("step", parents=[folder, rows], help=f"one step of one row, for ncu {OPTIONS}")
    counter = commands.add_parser("counters", parents=[folder, rows], help="what ncu counted of it, beside the plan")
    counter.add_argument("csv", type=Path, help="what ncu wrote")
    reporter = commands.add_parser("report", help="table and picture")
    reporter.add_argument("out", type=Path)
    reporter.add_argument("--results", type=Path, metavar="FOLDER", help="write DATE-GPU.json and .svg there too")
    commands.add_parser("predict", parents=[rows], help="what is expected of each row, from a model of costs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
