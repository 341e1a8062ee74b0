"""A package of ours against other engines on this processor: in turns, at the same threads, beside the bandwidth.

Run: python -m benchmarks.cpu CONFIG.json --bits 4 --peers-python PEERS/bin/python [--peers llama.cpp,openvino]
What the figures mean, and how to make the peers' interpreter: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import busy_seconds, machine_facts
from benchmarks.measures import DEFAULT, Measure, Run, parse_measures, summarize
from benchmarks.peers.shapes import parameters
from benchmarks.protocol import Worker, WorkerError
from benchmarks.report import print_facts, print_table, say
from benchmarks.systems import OURS, PEERS, Job, Unavailable, start


def main() -> None:
    """Compare, print, and write all rounds as JSON."""
    options = _options()
    measures = parse_measures(options.only, options.prefill, options.decode)
    config = json.loads(options.config.read_text())
    measures = _that_fit(measures, config["max_position_embeddings"])
    job = Job(
        config=options.config.resolve(),
        bits=options.bits,
        threads=options.threads,
        longest=max(measure.context for measure in measures) + 1,
        work=options.work,
        peers_python=options.peers_python,
        quantization=options.quant,
        compile_options=options.compile_options,
        package=options.package,
    )
    started = datetime.now(UTC)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in (OURS, *filter(None, options.peers.split(","))):
            try:
                workers[name] = stack.enter_context(start(name, job, say))
            except (Unavailable, WorkerError) as error:
                if name == OURS:
                    sys.exit(f"llmc: {error}")
                say(f"without {name}: {error}")
        runs = compare(workers, measures, options.rounds)
        facts = {name: worker.ask("facts") for name, worker in workers.items()}
    for known in facts.values():
        known["bits_per_weight"] = 8 * known["weights_bytes"] / parameters(config)
    rows = [
        row
        for measure in measures
        for name, known in facts.items()
        if (row := summarize(measure, name, runs, known, OURS)) is not None
    ]
    document = {
        "date": started.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.cpu", *sys.argv[1:]]),
        "machine": machine_facts(),
        "shape": job.shape,
        "bits": job.bits,
        "threads": job.threads,
        "parameters": parameters(config),
        "systems": facts,
        "measures": [vars(measure) for measure in measures],
        "summary": rows,
        "runs": [run.as_json() for run in runs],
    }
    print_facts(document)
    print_table(rows)
    if options.results is not None:
        options.results.mkdir(parents=True, exist_ok=True)
        path = options.results / f"{started:%Y-%m-%d}-cpu-{job.shape}-{job.bits}bit.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        say(f"all rounds: {path}")


def compare(workers: dict[str, Worker], measures: list[Measure], rounds: int) -> list[Run]:
    """Every measure by every system, in turns: in each round one after another, the order turned round each time.

    A system that fails at a measure leaves it, with a line that says so; the others go on.
    """
    able = {measure.name: _warm(workers, measure) for measure in measures}
    runs: list[Run] = []
    for i in range(rounds):
        for measure in measures:
            names = able[measure.name][:: 1 if i % 2 == 0 else -1]
            probe = _probe(workers)
            for name in list(names):
                try:
                    seconds, idle, foreign = _timed(workers, name, measure)
                except WorkerError as error:
                    say(f"{measure.name}: without {name}: {error}")
                    able[measure.name].remove(name)
                    continue
                after = _probe(workers)
                runs.append(Run(i, measure.name, name, seconds, (probe + after) / 2, idle, foreign))
                probe = after
        say(f"round {i + 1} of {rounds}")
    return runs


def _warm(workers: dict[str, Worker], measure: Measure) -> list[str]:
    """Fill the contexts and touch all memory, untimed; the systems that can do this measure."""
    able = []
    for name, worker in workers.items():
        if measure.sequences > 1 and name != OURS and not PEERS[name].batches:
            continue
        try:
            _run(worker, measure)
            able.append(name)
        except WorkerError as error:
            say(f"{measure.name}: without {name}: {error}")
    return able


def _run(worker: Worker, measure: Measure) -> float:
    if measure.kind == "prefill":
        return float(worker.ask("prefill", tokens=measure.tokens))
    arguments = {"depth": measure.depth, "steps": measure.tokens, "sequences": measure.sequences}
    return float(worker.ask("decode", **arguments))


def _timed(workers: dict[str, Worker], name: str, measure: Measure) -> tuple[float, float, float]:
    """Seconds; and cores used meanwhile by the other workers, and by everything else."""
    for worker in workers.values():
        worker.settle()
    before, busy, start = {n: w.cpu_seconds() for n, w in workers.items()}, busy_seconds(), time.monotonic()
    seconds = _run(workers[name], measure)
    wall = time.monotonic() - start
    used = {n: w.cpu_seconds() - before[n] for n, w in workers.items()}
    foreign = busy_seconds() - busy - sum(used.values())
    return seconds, sum(s for n, s in used.items() if n != name) / wall, max(0.0, foreign / wall)


def _probe(workers: dict[str, Worker]) -> float:
    return float(workers[OURS].ask("probe"))


def _that_fit(measures: list[Measure], limit: int) -> list[Measure]:
    for measure in measures:
        if measure.context >= limit:
            say(f"without {measure.name}: {measure.context} tokens, the model's context holds {limit}")
    fitting = [measure for measure in measures if measure.context < limit]
    if not fitting:
        sys.exit("no measure fits into the model's context")
    return fitting


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="config.json of the shape; weights are random")
    parser.add_argument("--bits", type=int, choices=(4, 8), required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--decode", type=int, default=128, metavar="STEPS")
    parser.add_argument("--only", default=DEFAULT, metavar="MEASURES", help=f"default: {DEFAULT}")
    parser.add_argument("--peers", default="llama.cpp", help=f"of {','.join(PEERS)}")
    parser.add_argument("--peers-python", metavar="PYTHON", help="interpreter that has the peers; without it: no peers")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "llmc-bench", help="made models")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write all rounds there, as JSON")
    parser.add_argument("--quant", help="of our package, instead of the q4 or q8 that --bits means")
    parser.add_argument("--compile-options", default="", metavar="TEXT", help="more options for llmc compile")
    parser.add_argument("--package", type=Path, help="a package that is there, instead of compiling one")
    options = parser.parse_args()
    unknown = set(filter(None, options.peers.split(","))) - PEERS.keys()
    if unknown:
        parser.error(f"--peers: {', '.join(sorted(unknown))} unknown; known are {', '.join(PEERS)}")
    return options


if __name__ == "__main__":
    main()
