"""Rewriting: find subgraphs, put others in their place. A non-match gives its reason; firings are counted.

A pattern is traced from a function in the builder's vocabulary, so the fusion rule of a fused op is its `decompose`
with holes for operands and attributes. A rule that has to look at shapes overrides `match`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeAlias

from llmc.ir.graph import Graph, Leaf, remake
from llmc.ir.op import Emitter, Node, Op, Value, as_tuple
from llmc.ir.pattern import Match, NoMatch, Var, operand_count, trace


class Rule:
    """One rewrite. `roots` are the op classes at which a match may end."""

    name: ClassVar[str] = "rule"
    roots: ClassVar[tuple[type[Op], ...]] = ()
    shares: ClassVar[bool] = False
    """Whether inner values of a match may be used elsewhere too, where they are then computed once more: for what is
    cheap, and whose other uses are likely to be fused as well."""

    def root_ops(self) -> tuple[type[Op], ...]:
        """Op classes that the engine offers to `match`."""
        return self.roots

    def title(self) -> str:
        """The rule's name in counts and reports."""
        return self.name

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        """Whether the subgraph that ends at `root` fits; if not, why."""
        raise NotImplementedError

    def rewrite(self, b: Emitter, match: Match) -> Any:
        """The values that take the place of `match.replaced`; made with `b`, which carries the root's `loc`."""
        raise NotImplementedError


class PatternRule(Rule):
    """A rule whose `pattern` is traced; `operand_names` name its operands, `Var`s its attributes."""

    operand_names: Sequence[str] = ()

    def pattern(self, b: Emitter, *operands: Value) -> Any:
        """The subgraph to look for. A value or a tuple; the last one is the root."""
        raise NotImplementedError

    def check(self, match: Match, graph: Graph) -> NoMatch | None:
        """A last look at types and attributes."""
        return None

    def __init__(self) -> None:
        self.traced = trace(self.pattern, self.operand_names)

    def root_ops(self) -> tuple[type[Op], ...]:
        return (type(self.traced.results[-1].op),)

    def match(self, root: Node, graph: Graph) -> Match | NoMatch:
        found = self.traced.match(root)
        return found if isinstance(found, NoMatch) else self.check(found, graph) or found


class Fuse(PatternRule):
    """The rule that puts a fused op where its decomposition stands."""

    def __init__(self, fused: type[Op], **fixed: Any) -> None:
        self.fused = fused
        self.fixed = fixed
        holes = {f.name: fixed.get(f.name, Var(f.name)) for f in fields(fused)}  # type: ignore[arg-type]
        pattern_op = fused(**holes)
        count = operand_count(fused)
        self.operand_names = [f"operand{i}" for i in range(count)]
        self.traced = trace(pattern_op.decompose, self.operand_names)

    def title(self) -> str:
        return self.fused.name.replace("_", "-")

    def rewrite(self, b: Emitter, match: Match) -> Any:
        op = self.fused(**{**match.attributes, **self.fixed})
        return b(op, *(match[name] for name in self.operand_names))


Plan: TypeAlias = Sequence[tuple[Rule, Match]]
"""Matches that do not overlap, in the order of their roots."""


@dataclass
class Budget:
    """How many rewrites may still happen (for bisection); None is no limit."""

    remaining: int | None = None

    @property
    def spent(self) -> bool:
        """Whether none is left."""
        return self.remaining is not None and self.remaining <= 0

    def take(self) -> bool:
        """Use one; False when none is left."""
        if self.spent:
            return False
        if self.remaining is not None:
            self.remaining -= 1
        return True

    def give_back(self, count: int) -> None:
        """Return what was taken and not used."""
        if self.remaining is not None:
            self.remaining += count


@dataclass
class Rewritten:
    """What `rewrite` did: the graph, firings by rule, and refusals by rule (deepest first)."""

    graph: Graph
    counts: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, list[NoMatch]] = field(default_factory=dict)


def rewrite(graph: Graph, rules: Sequence[Rule], budget: Budget | None = None) -> Rewritten:
    """Apply the rules until none fires. Overlapping matches go to the first root in topological order."""
    budget = budget or Budget()
    done = Rewritten(graph, {r.title(): 0 for r in rules})
    while True:
        done.refusals = {r.title(): [] for r in rules}
        plan = _plan(done.graph, rules, budget, done)
        if not plan:
            break
        done.graph, applied = _apply(done.graph, plan)
        budget.give_back(len(plan) - len(applied))
        for rule, _ in applied:
            done.counts[rule.title()] += 1
    for reasons in done.refusals.values():
        reasons.sort(key=lambda n: -n.depth)
    return done


def _plan(graph: Graph, rules: Sequence[Rule], budget: Budget, done: Rewritten) -> Plan:
    plan: list[tuple[Rule, Match]] = []
    claimed: set[Node] = set()
    order = {n: i for i, n in enumerate(graph.nodes)}
    by_root: dict[type[Op], list[Rule]] = {}
    for rule in rules:
        for root in rule.root_ops():
            by_root.setdefault(root, []).append(rule)
    for node in graph.nodes:
        for rule in by_root.get(type(node.op), ()):
            found = rule.match(node, graph)
            if isinstance(found, Match):
                if found.nodes & claimed:
                    break  # the next round looks again
                refusal = _illegal(rule, found, graph, order)
                if refusal is None:
                    if not budget.take():
                        return plan
                    claimed |= found.nodes
                    plan.append((rule, found))
                    break
                found = refusal
            done.refusals[rule.title()].append(found)
    return plan


def _illegal(rule: Rule, match: Match, graph: Graph, order: Mapping[Node, int]) -> NoMatch | None:
    """An inner value that is needed outside, or an operand that depends on what the match removes."""
    kept = set(match.replaced)
    for node in match.nodes:
        if node in graph.parameter_only or rule.shares:
            continue
        for value in node.results:
            if value in kept:
                continue
            readers = [n for n, _ in graph.uses.get(value, ()) if n not in match.nodes]
            if readers or value in graph.results:
                reader = repr(readers[0]) if readers else "a result of the graph"
                return NoMatch(f"its inner value is also used by {reader}", node, len(match.nodes))
    first = min((order[n] for n in match.nodes if n in order), default=0)
    removed = {v.node for v in match.replaced}
    stack, seen = [v.node for v in match.operands.values()], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen or order.get(node, -1) < first:
            continue
        if node in removed:
            return NoMatch("an operand depends on a value that would be replaced", node, len(match.nodes))
        seen.add(node)
        stack += [v.node for v in node.inputs]
    return None


def _apply(graph: Graph, plan: Plan) -> tuple[Graph, Plan]:
    """Rebuild with the planned matches replaced; an item is a node or a whole match, ordered by what it needs.

    Gives the graph and the part of the plan that was carried out: two matches may each need what the other replaces.
    """
    owner: dict[Value, int] = {v: i for i, (_, m) in enumerate(plan) for v in m.replaced}
    new: dict[Value, Value] = {}
    expanding: set[Node | int] = set()

    def item(value: Value) -> Node | int | None:
        if value in new or isinstance(value.op, Leaf):
            return None
        return owner.get(value, value.node)

    def needs(current: Node | int) -> Iterator[Node | int]:
        operands = plan[current][1].operands.values() if isinstance(current, int) else current.inputs
        return (i for i in map(item, operands) if i is not None)

    def emit(current: Node | int) -> None:
        if isinstance(current, int):
            rule, found = plan[current]
            b = Emitter()
            b.loc = found.root.loc
            operands = {name: new.get(v, v) for name, v in found.operands.items()}
            made = as_tuple(rule.rewrite(b, Match(found.root, operands, found.attributes, found.nodes, found.replaced)))
            assert len(made) == len(found.replaced), f"{rule.title()} replaces {len(found.replaced)} values"
            for old, value in zip(found.replaced, made, strict=True):
                assert old.type == value.type, f"{rule.title()}: {old.type} became {value.type}"
                new[old] = value
        else:
            made_node = remake(current, tuple(new.get(v, v) for v in current.inputs))
            for old, value in zip(current.results, made_node.results, strict=True):
                new.setdefault(old, value)

    for result in (*(v for _, v in graph.outputs), *graph.next_states):
        first = item(result)
        stack: list[Node | int] = [] if first is None else [first]
        while stack:
            current = stack[-1]
            pending = next(needs(current), None)
            if pending is None:
                emit(current)
                expanding.discard(stack.pop())
            elif pending in expanding:
                return _apply(graph, plan[:1])  # two matches wait for each other: one at a time
            else:
                expanding.add(current)
                stack.append(pending)
    outputs = tuple((name, new.get(v, v)) for name, v in graph.outputs)
    following = tuple(new.get(v, v) for v in graph.next_states)
    return Graph(graph.name, graph.inputs, graph.params, graph.states, outputs, following), plan
