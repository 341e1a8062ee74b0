"""From a function of one sequence to a step over a ragged batch, whose keys and values live in paged state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.ir.errors import LlmcError
from llmc.ir.graph import Graph, Input, LayerGroup, State, StateInput, layer_groups, substitute_attributes
from llmc.ir.op import Emitter, Node, Value
from llmc.ir.ops.attention import Attention, PagedAttention
from llmc.ir.ops.cache import KvAppend
from llmc.ir.types import Dim, DType, Linear, Sym, TensorType, symbol
from llmc.passes.base import Pass, PassContext, Trial
from llmc.passes.token_axes import token_axes


@dataclass(frozen=True)
class PagedKv(Pass):
    """Every `attention` becomes `kv_append` and `paged_attention` over two states, `<place>.key` and `<place>.value`;
    with dtype i8 these are codes, and `<place>.key_scale` and `<place>.value_scale` their scales.

    Layers whose attention has a window are a group of their own for each window, `window_<tokens>`, beside `full`: the
    group has a number of blocks, a slot_mapping and block_tables of its own (see `ir.graph.layer_groups`), in which
    entries for blocks that lie wholly before the window may be anything.

    Takes token_ids and positions i32 [tokens] to logits [tokens, vocab]. Adds the inputs slot_mapping i32 [tokens],
    query_start i32 [sequences + 1], block_tables i32 [sequences, max_blocks] and logit_rows i32 [outputs]; logits
    become [outputs, vocab], `greedy` i32 [outputs] is their argmax. Rows are selected as early as one gather can. The
    longest sequence bounds a sequence's positions, not a batch's tokens: the new symbols have no upper bounds.

    Raises `LlmcError` where anything but attention mixes tokens, or the interface is another.
    """

    name = "paged-kv"
    stage = "step"

    block_size: int = 16
    dtype: DType = DType.F16

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise LlmcError(f"block_size must be at least 1, given {self.block_size}")
        if not self.dtype.is_float and self.dtype is not DType.I8:
            raise LlmcError(f"keys and values are floating point, or i8 with scales: dtype cannot be {self.dtype}")

    def run(self, graph: Graph, context: PassContext) -> Graph:
        given = _check_interface(graph)
        if not context.fire("paged-kv"):
            return graph
        graph = graph.substitute({given.name: symbol("tokens")})
        tokens = symbol("tokens")
        axes = token_axes(graph, tokens, lambda op: isinstance(op, Attention))
        logits = dict(graph.outputs)["logits"]
        if axes[logits] != 0:
            raise LlmcError(f"logits are {logits.type}; expected the tokens first")
        paging = _Paging(graph, self)
        paged = graph.map(paging.emit)
        outputs = symbol("outputs")
        rows = paging.input("logit_rows", (outputs,))
        new = _gathered(dict(paged.outputs)["logits"], rows, tokens, outputs)
        context.record.numbers["states"] = len(paging.states)
        b = Emitter()
        results = {**dict(paged.outputs), "logits": new, "greedy": b.argmax(new)}
        return Graph(
            graph.name,
            (*graph.inputs, *paging.inputs.values()),
            graph.params,
            (*graph.states, *(Value(v.node) for v in paging.states)),
            tuple(results.items()),
            (*paged.next_states, *paging.states.values()),
        )

    def trials(self, before: Graph, after: Graph, given: Trial) -> tuple[Trial, Trial]:
        """The one sequence in shuffled blocks; what is in no block of it is NaN."""
        count = len(given.inputs["positions"])
        blocks = -(-count // self.block_size)
        random = np.random.default_rng(count)
        positions = np.asarray(given.inputs["positions"], np.int64)
        inputs = {**given.inputs, "query_start": np.array([0, count]), "logit_rows": np.arange(count)}
        sizes = {}
        for group in after.layer_groups:
            table = random.permutation(blocks + 2)[:blocks]
            slots = table[positions // self.block_size] * self.block_size + positions % self.block_size
            inputs |= {group.slot_mapping: slots, group.block_tables: table[None, :]}
            sizes[group.num_blocks] = blocks + 2
        states = {
            v.op.state.name: np.full(v.type.concrete(sizes), np.nan if v.type.dtype.is_float else 127)
            for v in after.states
            if isinstance(v.op, StateInput)
        }
        return given, Trial(inputs, {**given.states, **states})


def _check_interface(graph: Graph) -> Sym:
    """The symbol that counts tokens."""
    inputs = {v.op.label: v.type for v in graph.inputs if isinstance(v.op, Input)}
    if set(inputs) != {"token_ids", "positions"} or "logits" not in dict(graph.outputs) or graph.states:
        raise LlmcError(
            "expected a function of one sequence, from token_ids and positions to logits and without states;"
            f" given inputs {sorted(inputs)}, outputs {sorted(dict(graph.outputs))}, {len(graph.states)} states"
        )
    shapes = {t.shape for t in inputs.values()}
    dims = {s for shape in shapes for d in shape for s in ([d.terms[0][0]] if isinstance(d, Linear) else [])}
    tokens = dims.pop() if len(dims) == 1 else None
    if not isinstance(tokens, Sym) or {TensorType(DType.I32, (Linear(((tokens, 1),)),))} != set(inputs.values()):
        raise LlmcError(f"expected token_ids and positions i32[tokens], given {', '.join(map(str, inputs.values()))}")
    taken = {"tokens", "sequences", "max_blocks", "num_blocks", "outputs"}
    clash = {name for name in graph.symbols if name in taken or name.startswith("num_blocks_")} - {tokens.name}
    if clash:
        raise LlmcError(f"the symbols {', '.join(sorted(clash))} are taken already")
    return tokens


class _Paging:
    """The new inputs and states, made as attentions need them."""

    def __init__(self, graph: Graph, options: PagedKv) -> None:
        self.options = options
        self.positions = graph.leaf("positions")
        self.inputs: dict[str, Value] = {}
        self.states: dict[Value, Value] = {}
        """The last version of each state by its first."""
        self.names: set[str] = set()
        sequences, max_blocks = symbol("sequences"), symbol("max_blocks")
        self.groups = layer_groups(n.op.window for n in graph.nodes if isinstance(n.op, Attention))
        for group in self.groups:
            self.input(group.slot_mapping, self.positions.type.shape)
            self.query_start = self.input("query_start", (sequences + 1,))
            self.input(group.block_tables, (sequences, max_blocks))

    def input(self, label: str, shape: tuple[Dim, ...]) -> Value:
        """A new i32 input, made when it is first asked for."""
        value = Value(Node(Input(label), (), (TensorType(DType.I32, shape),)))
        return self.inputs.setdefault(label, value)

    def emit(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """What takes the node's place."""
        b = Emitter()
        b.loc = node.loc
        op = node.op
        if not isinstance(op, Attention):
            return node.results if inputs == node.inputs else b.make(op, inputs).results
        q, k, v, positions, *per_head = inputs
        if positions != self.positions:
            raise LlmcError(f"{node!r} has positions of its own; a step has one vector of positions")
        group = next(group for group in self.groups if group.window == op.window)
        slots, tables = self.inputs[group.slot_mapping], self.inputs[group.block_tables]
        blocks, size = symbol(group.num_blocks), self.options.block_size
        place = self._unique(node.loc)
        kv, scaled = self.options.dtype, self.options.dtype is DType.I8
        states = [
            self._state(group, f"{place}.key", kv, (blocks, op.num_kv_heads, op.head_dim, size)),
            self._state(group, f"{place}.value", kv, (blocks, op.num_kv_heads, size, op.value_width)),
        ]
        if scaled:
            scales = (blocks, op.num_kv_heads, size)
            states += [self._state(group, f"{place}.{of}_scale", DType.F32, scales) for of in ("key", "value")]
        append = KvAppend(op.num_kv_heads, op.head_dim, scaled, op.value_dim)
        caches = b(append, k, v, slots, *states)
        self.states.update(zip(states, caches, strict=True))
        paged = PagedAttention(**vars(op), scaled=scaled)
        return (b.one(paged, q, *caches, positions, self.query_start, tables, *per_head),)

    def _state(self, group: LayerGroup, name: str, dtype: DType, shape: tuple[Dim, ...]) -> Value:
        state = State(name, "paged_kv", dtype, shape, group.name)
        return Value(Node(StateInput(state), (), (TensorType(state.dtype, shape),)))

    def _unique(self, place: str) -> str:
        """The attention's place, numbered where it has none or shares it."""
        name = place or "attention"
        number = 1
        while name in self.names:
            number += 1
            name = f"{place or 'attention'}_{number}"
        self.names.add(name)
        return name


def _gathered(value: Value, rows: Value, tokens: Dim, outputs: Dim) -> Value:
    """The value for the wanted rows only: the gather is moved up while one operand alone carries tokens."""
    chain: list[tuple[Node, int]] = []
    base = value
    while True:
        node = base.node
        carriers = [i for i, v in enumerate(node.inputs) if tokens in v.type.shape]
        if len(carriers) != 1 or base.index or len(node.types) > 1:
            break
        operand = node.inputs[carriers[0]]
        if operand.type.rank != 2 or not operand.type.dtype.is_float or operand.type.shape[0] != tokens:
            break
        chain.append((node, carriers[0]))
        base = operand
    b = Emitter()
    b.loc = chain[-1][0].loc if chain else value.node.loc
    current: Value = b.gather_rows(base, rows)
    for node, carrier in reversed(chain):
        b.loc = node.loc
        op = substitute_attributes(node.op, {"tokens": outputs})
        current = b(op, *(current if i == carrier else v for i, v in enumerate(node.inputs)))
    return current
