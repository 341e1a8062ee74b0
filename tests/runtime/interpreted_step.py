"""An executor that interprets a step graph in float64: a model from its graph to its completions, without kernels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from threading import RLock

import numpy as np

from llmc.backends.base import Entry, plan_head
from llmc.entries import specialised
from llmc.ir.graph import Graph, StateInput
from llmc.ir.interpret import interpret
from llmc.ir.op import Array
from llmc.options import Limits as CompiledLimits
from llmc.passes.plan_memory import MemoryPlan
from llmc.runtime.batch import Batch, StepOutput
from llmc.runtime.document import Field
from llmc.runtime.kv_cache import most_blocks
from llmc.runtime.manifest import ModelFacts
from llmc.runtime.model import Model
from llmc.runtime.plan import inputs_of, parse_head
from llmc.runtime.timings import Profile

NOTHING = MemoryPlan({}, 0, 0)


class InterpretedExecutor:
    """`batch.Executor` over a step graph, with what a plan says of it. Memory that was never written is NaN."""

    def __init__(
        self, step: Graph, params: Mapping[str, Array], limits: CompiledLimits, block_size: int, longest: int
    ) -> None:
        self.lock = RLock()
        self.step_graph, self.params = step, params
        entries = {name: _entry(name, graph) for name, graph in specialised(step, limits)}
        document = json.loads(json.dumps(plan_head(list(entries.values()), step, block_size)))
        self.head = parse_head(Field(document, "plan.json"))
        self.limits, self.groups, self.block_size = self.head.limits, self.head.groups, self.head.block_size
        self.vocab_size = int(dict(step.outputs)["logits"].type.concrete({"outputs": 1})[1])
        self.entry_tokens: Mapping[str, tuple[int, int]] = {n: e.bounds["tokens"] for n, e in entries.items()}
        self.samples_on_device = False
        sequences, tokens, blocks = self.limits.sequences, self.limits.tokens, -(-longest // block_size)
        self.num_blocks = tuple(most_blocks(g, sequences, blocks, tokens, block_size) for g in self.groups)
        self.states: dict[str, Array] = {
            s.name: np.full((self.num_blocks[s.group], *s.block_shape), np.nan) for s in self.head.states
        }

    def step(self, entry: str, batch: Batch, profile: Profile | None = None) -> StepOutput:
        inputs = {name: batch.input(name) for name in inputs_of(self.groups)}
        given = {name: array for name, array in inputs.items() if array is not None}
        results = interpret(self.step_graph, given, self.params, self.states)
        self.states = results.states
        return StepOutput(results.outputs["logits"].astype(np.float32), results.outputs["greedy"].astype(np.int32))

    def copy_block(self, group: int, source: int, destination: int) -> None:
        for spec in self.head.states:
            if spec.group == group:
                self.states[spec.name][destination] = self.states[spec.name][source]

    def close(self) -> None:
        self.states = {}


def interpreted(step: Graph, params: Mapping[str, Array], limits: CompiledLimits, longest: int) -> Model:
    """A `Model` over the step."""
    keys = [v.op.state for v in step.states if isinstance(v.op, StateInput) and v.op.label.endswith("key")]
    block_size = keys[0].shape[-1]
    assert isinstance(block_size, int)
    executor = InterpretedExecutor(step, params, limits, block_size, longest)
    return Model(executor, ModelFacts("interpreted", executor.vocab_size, longest, None, (), False))


def _entry(name: str, graph: Graph) -> Entry:
    bounds = {}
    for symbol in ("tokens", "sequences", "outputs"):
        found = graph.symbols.get(symbol) or graph.symbols["tokens"]
        assert found.max is not None
        bounds[symbol] = (found.min, found.max)
    return Entry(name, bounds, graph, (), NOTHING, NOTHING)
