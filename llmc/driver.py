"""From a model to a package: import, passes, lowering, tuning, kernels, packing. One screen of orchestration."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from llmc.backends.buffers import parameters
from llmc.backends.choose import backend_for
from llmc.backends.package import PackageWriter, check_name, to_json
from llmc.backends.wheel import write_wheel
from llmc.checks import make_checks
from llmc.compile_report import CompileReport
from llmc.contents import graph_files, make_manifest, runtime_files, state_sizes
from llmc.dtypes import check_8_bit_floats, check_kv_quant, compute_dtype, kv_dtype
from llmc.entries import specialised
from llmc.importers.choose import import_model
from llmc.ir.graph import Graph
from llmc.ir.interpret import evaluate_parameters
from llmc.ir.op import Array, Value
from llmc.ir.target import parse_target
from llmc.ir.types import DType
from llmc.ir.verify import verify
from llmc.options import LIMITS, CompileOptions
from llmc.passes.base import Observer, PassContext
from llmc.passes.observe import Dumper, NumericsCheck, Verifier, together
from llmc.passes.pipelines import step_pipeline
from llmc.passes.plan_memory import largest_bytes
from llmc.passes.quantize import Quantize
from llmc.quantization import activations_of, described, read_quantization
from llmc.tuning import Tuned, tune
from llmc.tuning_devices import tuning_devices


def compile_model(
    model: Path, output: Path, options: CompileOptions, progress: Callable[[str], None] = lambda phase: None
) -> CompileReport:
    """Compile a model folder or configuration into the package folder `output`.

    Raises `LlmcError` with one clear message; then nothing is left at `output`.
    """
    name = check_name(options.name or output.absolute().name)
    target = parse_target(options.target, host_flags())
    quant = read_quantization(options.quant, activations_of(target))
    check_kv_quant(options.kv_quant, target)
    check_8_bit_floats(quant, options.kv_quant, target)
    report = CompileReport(output.absolute(), progress)
    with (
        tuning_devices(target) if options.tune else nullcontext() as devices,
        PackageWriter(output, options.force) as package,
        tempfile.TemporaryDirectory(prefix="llmc-") as scratch,
    ):
        with report.phase("import"):
            imported = import_model(
                model,
                architecture=options.architecture,
                max_sequence_length=options.max_sequence_length,
                random_weights=options.random_weights,
            )
        load = imported.weights.load
        package.require_space(imported.weights.bytes if options.weights else 0)
        compute = compute_dtype(imported.graph, quant, target)
        kv = kv_dtype(options.kv_quant, imported.graph, target, compute)
        backend_of = partial(backend_for, target, imported.info.max_sequence_length, compute)
        backend = backend_of()
        with report.phase("passes"):
            step = run_passes(imported.graph, load, options, kv, quant, report)
            lowered = backend.lower(step)
            verify(lowered)
            limits = options.limits or LIMITS[target.kind]
            graphs = dict(specialised(lowered, limits, backend.entry_names))
            entries = [backend.plan(name, graph) for name, graph in graphs.items()]
        tuned = Tuned()
        if devices:
            with report.phase("tuning"):
                tuned = tune(entries, target.gpu_variants, devices)
                backend = backend_of(tunings=tuned.tunings)
                entries = [backend.plan(name, graph) for name, graph in graphs.items()]
        report.tuning = tuned.report
        report.memory = {e.name: e.memory_bytes for e in entries}
        with report.phase("kernels"):
            kernels = backend.compile(entries, Path(scratch))
            report.kernel_seconds = dict(kernels.seconds)
        with report.phase("packing"):
            tensors = parameters(entries)
            if options.weights:
                kept: dict[Value, Array] = {}
                lazy = [(label, partial(evaluate_parameters, v, load, kept)) for label, v in tensors.items()]
                placed = package.write_tensors("weights.bin", lazy)
            else:
                sizes = {label: largest_bytes(v.type) for label, v in tensors.items()}
                placed = package.place_tensors("weights.bin", sizes)
        with report.phase("checks"):
            checks = make_checks(imported.graph, load, imported.info, kv, quant, target, options)
        plans = backend.describe(entries, placed, step, options.block_size)
        for file, data in {
            **kernels.files,
            **imported.tokenizer_files,
            **runtime_files(name),
            **graph_files({"model": imported.graph, "step": step, **{e.name: e.graph for e in entries}}),
            **{file: to_json(plan) for file, plan in plans.items()},
            "checks.json": to_json(checks),
        }.items():
            package.write(file, data)
        report.sizes = {
            "weights": package.files["weights.bin"]["bytes"],
            "kernels": sum(map(len, kernels.files.values())),
            **state_sizes(step, options.block_size),
            "arena": max(entry.memory.peak for entry in entries),
            "private": max(entry.private.peak for entry in entries),
        }
        manifest = make_manifest(
            name,
            imported,
            kernels,
            described(quant, step),
            kv,
            target,
            backend.versions,
            report.sizes,
            tuned.architectures,
        )
        package.finish(manifest)
    if options.wheel:
        report.wheel = write_wheel(report.package, manifest, name)
    report.finish()
    return report


def run_passes(
    graph: Graph,
    load: Callable[[str], Array],
    options: CompileOptions,
    kv_dtype: DType,
    quant: Quantize | None,
    report: CompileReport,
) -> Graph:
    """The step graph: the pipeline, verified after every pass and watched as the options ask."""
    context = PassContext()
    observers: list[Observer] = [Verifier(), report.observe_pass(context)]
    if options.dump_ir is not None:
        observers.append(Dumper(options.dump_ir, context))
    if options.check_numerics:
        observers.append(NumericsCheck(load))
    return step_pipeline(kv_dtype, options.block_size, quant).run(graph, context, together(*observers))


def host_flags() -> frozenset[str]:
    """This machine's CPU features, by their names in /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
