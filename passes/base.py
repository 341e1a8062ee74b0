"""What a pass is, how it is named on a command line, and how a list of passes is run."""

from __future__ import annotations

import time
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeAlias

from llmc.ir.errors import LlmcError, ParseError, nearest
from llmc.ir.graph import Graph
from llmc.ir.op import Array
from llmc.ir.pattern import NoMatch
from llmc.ir.printer import attribute_text
from llmc.ir.rewrite import Budget, Rule, rewrite
from llmc.ir.text import parse_attribute, split
from llmc.ir.types import DType
from llmc.ir.verify import STAGES


@dataclass(frozen=True)
class Trial:
    """Arrays on which a graph is interpreted: inputs and states by name."""

    inputs: Mapping[str, Array]
    states: Mapping[str, Array] = field(default_factory=dict)


@dataclass
class Record:
    """What one run of one pass did: firings and refusals by rule, numbers for reports."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, list[NoMatch]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)


class PassContext:
    """What the passes of one pipeline share: the budget of rewrites, and a record for each pass that ran."""

    def __init__(self, limit: int | None = None) -> None:
        self.budget = Budget(limit)
        self.records: list[Record] = []

    def begin(self, name: str) -> None:
        """A new record, into which the pass of that name writes."""
        self.records.append(Record(name))

    @property
    def record(self) -> Record:
        """The record of the pass that is running."""
        if not self.records:
            self.begin("")
        return self.records[-1]

    def rewrite(self, graph: Graph, *rules: Rule) -> Graph:
        """Apply rules until none fires, within the budget; firings and refusals are recorded."""
        done = rewrite(graph, rules, self.budget)
        for title, count in done.counts.items():
            self.record.counts[title] = self.record.counts.get(title, 0) + count
        for title, refusals in done.refusals.items():
            self.record.refusals.setdefault(title, []).extend(refusals)
        return done.graph

    def fire(self, title: str) -> bool:
        """Count one rewrite that a pass makes by itself; False when the budget is spent and it must not."""
        if not self.budget.take():
            return False
        self.record.counts[title] = self.record.counts.get(title, 0) + 1
        return True

    @property
    def counts(self) -> dict[str, int]:
        """Firings by rule, over all passes."""
        total: dict[str, int] = {}
        for record in self.records:
            for title, count in record.counts.items():
                total[title] = total.get(title, 0) + count
        return total

    @property
    def refusals(self) -> dict[str, list[NoMatch]]:
        """Refusals by rule, over all passes, deepest first."""
        total: dict[str, list[NoMatch]] = {}
        for record in self.records:
            for title, refusals in record.refusals.items():
                total.setdefault(title, []).extend(refusals)
        return {title: sorted(refusals, key=lambda n: -n.depth) for title, refusals in total.items()}


class Pass(ABC):
    """A graph in, a graph out. A frozen dataclass whose fields are its options on the command line.

    A pass leaves a well-formed graph. `stage` is the earliest stage of compilation that its result may need.
    """

    registry: ClassVar[dict[str, type[Pass]]] = {}
    name: ClassVar[str]
    stage: ClassVar[str] = "primitive"
    tolerance: ClassVar[float] = 1e-9
    """Largest relative difference that `--check-numerics` accepts, both sides being computed in float64."""

    def __init_subclass__(cls) -> None:
        known = Pass.registry.get(cls.name)
        assert known is None or known.__qualname__ == cls.__qualname__, f"two passes are named {cls.name}"
        Pass.registry[cls.name] = cls

    @abstractmethod
    def run(self, graph: Graph, context: PassContext) -> Graph:
        """The transformed graph. Raises `LlmcError` where the graph is not one that the pass can take."""

    def trials(self, before: Graph, after: Graph, given: Trial) -> tuple[Trial, Trial]:
        """Arrays on which `before` and `after` must agree, made from those of `before`.

        A pass that changes what a graph takes overrides this.
        """
        return given, given

    def __str__(self) -> str:
        shown = []
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.default is MISSING or f.default != value:
                shown.append(f"{f.name}={value if isinstance(value, str) else attribute_text(value)}")
        return self.name + (f"{{{','.join(shown)}}}" if shown else "")


Observer: TypeAlias = Callable[[Pass, Graph, Graph, float], None]
"""Called after each pass with the pass, the graphs before and after, and the seconds it took."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order."""

    passes: tuple[Pass, ...]

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline(self.passes + other.passes)

    def run(self, graph: Graph, context: PassContext | None = None, observer: Observer | None = None) -> Graph:
        """The graph after every pass. A pass's `LlmcError` is raised again with the pass's name before it."""
        context = context or PassContext()
        for step in self.passes:
            context.begin(step.name)
            start = time.perf_counter()
            try:
                after = step.run(graph, context)
            except LlmcError as error:
                raise type(error)(f"pass {step}: {error}") from error
            seconds = time.perf_counter() - start
            if observer is not None:
                observer(step, graph, after, seconds)
            graph = after
        return graph

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))


def parse_pipeline(text: str) -> Pipeline:
    """Passes from their text form: `fuse-norm,specialize{entry=decode,tokens=64}`.

    Raises `ParseError` naming the pass or option that does not exist and the nearest that does.
    """
    return Pipeline(tuple(_parse_pass(part) for part in split(text)))


def stage_of(graph: Graph) -> str:
    """The earliest stage that allows every op of the graph."""
    return STAGES[max((STAGES.index(n.op.stage) for n in graph.nodes), default=0)]


def later_stage(first: str, second: str) -> str:
    """The later of two stages."""
    return max(first, second, key=STAGES.index)


def _parse_pass(text: str) -> Pass:
    name, brace, rest = text.partition("{")
    name = name.strip()
    kind = Pass.registry.get(name)
    if kind is None:
        raise ParseError(f"there is no pass {name!r}; {nearest(name, Pass.registry)}")
    if brace and not rest.rstrip().endswith("}"):
        raise ParseError(f"the options of {name!r} have no closing '}}': {text!r}")
    hints = typing.get_type_hints(kind)
    options = {f.name: hints[f.name] for f in fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for part in split(rest.rstrip().removesuffix("}")):
        key, equals, value = (p.strip() for p in part.partition("="))
        if key not in options:
            raise ParseError(f"the pass {name!r} has no option {key!r}; {nearest(key, options)}")
        if not equals:
            raise ParseError(f"the pass {name!r}: expected {key}=VALUE, given {part!r}")
        given[key] = _option(name, key, value, options[key])
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in given]  # type: ignore[arg-type]
    if missing:
        raise ParseError(f"the pass {name!r} needs the option {missing[0]!r}: {name}{{{missing[0]}=…}}")
    try:
        return kind(**given)
    except LlmcError as error:
        raise ParseError(f"the pass {name!r}: {error}") from None


def _option(name: str, key: str, text: str, kind: Any) -> Any:
    """An option's value in the type that its field declares."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if str in kinds and text != "None":
        return text.strip("'\"")
    try:
        value = parse_attribute(text)
    except ParseError:
        value = text
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in kinds:
        choices = ", ".join(d.value for d in DType) if DType in kinds else " or ".join(k.__name__ for k in kinds)
        raise ParseError(f"the pass {name!r}: {key}={text} is not of the expected kind: {choices}")
    return value


def common_place(places: Iterable[str]) -> str:
    """The longest dotted prefix that all places share: where a node stands that was merged from several."""
    split_places: Sequence[list[str]] = [p.split(".") for p in places]
    shared: list[str] = []
    for parts in zip(*split_places, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
