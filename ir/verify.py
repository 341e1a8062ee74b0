"""The verifier: inference run again, single use of states, which ops a stage allows. There is no second rule book."""

from __future__ import annotations

from llmc.ir.errors import LlmcError, VerificationError
from llmc.ir.graph import Graph, Leaf, StateInput
from llmc.ir.op import Node, Value
from llmc.ir.printer import op_text

STAGES = ("primitive", "fused", "step")
"""Stages of compilation in order; each allows the ops of those before it."""


def verify(graph: Graph, stage: str = "step") -> None:
    """Raise `VerificationError` unless the graph is well formed at the stage.

    Every node's recorded types are what inference gives; leaves are declared; states are updated in one chain each;
    no op belongs to a later stage.
    """
    allowed = STAGES[: STAGES.index(stage) + 1]
    declared = {*graph.inputs, *graph.params, *graph.states}
    _verify_leaves(graph)
    for node in graph.nodes:
        if node.op.stage not in allowed:
            raise _error(graph, node, f"an op of stage {node.op.stage!r} may not occur at stage {stage!r}")
        for value in node.inputs:
            if isinstance(value.op, Leaf) and value not in declared:
                raise _error(graph, node, f"it reads {value.op.label!r}, which the graph does not declare")
            if value.index >= len(value.node.types):
                raise _error(graph, node, f"it reads result {value.index} of {value.op.name}, which has fewer")
        try:
            inferred = node.op.infer(*(v.type for v in node.inputs))
        except LlmcError as error:
            raise _error(graph, node, str(error)) from error
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise _error(graph, node, f"its attributes make no sense: {error}") from error
        if inferred != node.types:
            recorded = ", ".join(map(str, node.types))
            raise _error(graph, node, f"recorded as {recorded}, inferred as {', '.join(map(str, inferred))}")
    _verify_states(graph)


def _verify_leaves(graph: Graph) -> None:
    if len(graph.next_states) != len(graph.states):
        raise VerificationError(
            f"graph {graph.name}: {len(graph.states)} states have {len(graph.next_states)} next values"
        )
    for kind, leaves in (("input", graph.inputs), ("parameter", graph.params), ("state", graph.states)):
        labels = [v.op.label for v in leaves if isinstance(v.op, Leaf)]
        double = {label for label in labels if labels.count(label) > 1} if len(set(labels)) < len(labels) else set()
        if double or len(labels) != len(leaves):
            raise VerificationError(f"graph {graph.name}: {kind} {', '.join(sorted(double))} is declared twice")
    declared = {*graph.inputs, *graph.params, *graph.states}
    for value in graph.results:
        if isinstance(value.op, Leaf) and value not in declared:
            raise VerificationError(f"graph {graph.name}: it returns {value.op.label!r}, which it does not declare")


def _verify_states(graph: Graph) -> None:
    """A state is a resource: each version is updated at most once, read by nothing after, and the last is returned."""
    for state, final in zip(graph.states, graph.next_states, strict=True):
        assert isinstance(state.op, StateInput)
        current: Value = state
        while True:
            updates = [(n, i) for n, i in graph.uses.get(current, ()) if i in n.op.updates]
            if not updates:
                break
            node, operand = updates[0]
            if len(graph.uses[current]) > 1:
                others = [n for n, _ in graph.uses[current] if n is not node] or [node]
                raise _error(graph, others[0], f"state {state.op.label!r} is used again after {node!r} has replaced it")
            current = node.results[node.op.updates[operand]]
        if current != final:
            raise VerificationError(f"graph {graph.name}: state {state.op.label!r} does not return its last version")


def _error(graph: Graph, node: Node, why: str) -> VerificationError:
    name, attributes = op_text(node.op)
    types = [v.type if v.index < len(v.node.types) else "?" for v in node.inputs]
    operands = ", ".join(f"{v.op.name}: {t}" for v, t in zip(node.inputs, types, strict=True))
    readers = ", ".join(sorted({n.op.name for v in node.results for n, _ in graph.uses.get(v, ())}))
    return VerificationError(
        f"graph {graph.name}, node {name}({operands}){attributes} at {node.loc or 'no place'}"
        f" (read by {readers or 'nothing'}): {why}"
    )
