"""What is measured, one row each: which package, in what kind of step, beside whom, and for how long at most."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = {"8b": "llama-3.1-8b", "1b": "llama-3.2-1b"}
"""Short name -> file of the configuration, without its ending."""
WEIGHTS = ("bf16", "int8", "int4")
CACHES = ("bf16", "fp8")
BATCHES = (1, 8, 64)
CONTEXTS = (1024, 8192)
PREFILL = 2048
LONGEST = 8192 + 256
"""Tokens of the longest sequence that packages are compiled for."""
FIRST_TOKEN_PROMPT = 16

COMPILED, EAGER = "torch.compile", "transformers"


@dataclass(frozen=True)
class Setup:
    """One package: a model, the format of its weights (its lm_head has 8 bits where they have 4), the cache's dtype."""

    model: str
    weights: str
    cache: str

    @property
    def name(self) -> str:
        """Its folder, which is its import name too."""
        return f"m{self.model}_{self.weights}_{self.cache}"

    @property
    def config(self) -> Path:
        """The file of the model's configuration."""
        return CONFIGS / f"{MODELS[self.model]}.json"

    @property
    def quant(self) -> str:
        """What `--quant` is given."""
        return {"bf16": "none", "int8": "q8g128", "int4": str(CONFIGS / "int4.toml")}[self.weights]


@dataclass(frozen=True)
class Row:
    """A measurement. `kind`: `decode`, `prefill` or `first-token`.

    Decode: a step of `batch` sequences that hold `context` tokens each. Prefill: `context` tokens of one sequence in
    one step. First token: a prompt of `context` tokens in a new process. `peer` is measured in turns with ours.
    `needs`: seconds that must be left for it to be started; `budget`: seconds after which it is ended.
    """

    kind: str
    setup: Setup
    batch: int
    context: int
    peer: str | None = None
    needs: float = 8.0
    budget: float = 60.0

    @property
    def name(self) -> str:
        """Unique, of letters, digits and `-`, so that patterns choose rows."""
        setup = self.setup
        base = f"{setup.model}-{setup.weights}-{setup.cache}"
        if self.kind == "first-token":
            return f"{base}-first-token"
        what = "prefill" if self.kind == "prefill" else f"b{self.batch}"
        beside = {None: "", COMPILED: "-vs-compile", EAGER: "-vs-eager"}[self.peer]
        return f"{base}-{what}-{self.context // 1024}k{beside}"

    @property
    def entry(self) -> str:
        """The package's entry point."""
        return "decode" if self.kind == "decode" else "prefill"

    @property
    def tokens(self) -> int:
        """New tokens of a step."""
        return self.batch if self.kind == "decode" else self.context


def all_rows() -> list[Row]:
    """Every row, in the order in which they run: rows of one package one after another, since opening one takes long,
    and what matters most first."""
    return [*_decode("8b", BATCHES, prefill=True), *_beside(), *_first_token(), *_decode("1b", (1,)), _eager()]


def select(rows: Iterable[Row], patterns: str | None) -> list[Row]:
    """The rows that match one of the patterns, such as `8b-*-b1-1k,*-vs-*`; all without. Raises `ValueError` for a
    pattern that matches none."""
    rows = list(rows)
    if not patterns:
        return rows
    wanted: set[str] = set()
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        found = {row.name for row in rows if fnmatchcase(row.name, pattern)}
        if not found:
            raise ValueError(f"--rows {pattern}: no row has such a name; rows are {', '.join(r.name for r in rows)}")
        wanted |= found
    return [row for row in rows if row.name in wanted]


def setups(rows: Iterable[Row]) -> list[Setup]:
    """The packages that rows need, each once."""
    return list(dict.fromkeys(row.setup for row in rows))


def _decode(model: str, batches: Sequence[int], prefill: bool = False) -> Iterator[Row]:
    for weights in WEIGHTS:
        for cache in CACHES:
            setup = Setup(model, weights, cache)
            yield from (Row("decode", setup, batch, context) for batch in batches for context in CONTEXTS)
            if prefill and cache == CACHES[0]:
                yield Row("prefill", setup, 1, PREFILL)


def _beside() -> Iterator[Row]:
    """torch.compile takes a minute or more to compile a model, so these rows are few."""
    for weights in WEIGHTS:
        yield Row("decode", Setup("8b", weights, "bf16"), 1, CONTEXTS[0], COMPILED, needs=75.0, budget=300.0)


def _first_token() -> Iterator[Row]:
    for model in ("1b", "8b"):
        setup = Setup(model, "int4", "bf16")
        yield Row("first-token", setup, 1, FIRST_TOKEN_PROMPT, needs=40.0, budget=120.0)


def _eager() -> Row:
    return Row("decode", Setup("8b", "bf16", "bf16"), 1, CONTEXTS[0], EAGER, needs=45.0, budget=120.0)
