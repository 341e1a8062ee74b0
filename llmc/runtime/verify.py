"""Holds a package against the checks that were stored when it was compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .batch import Float32
from .document import Field
from .engine import Engine
from .sequence import Sequence


@dataclass(frozen=True)
class Case:
    """A stored prompt: its largest logits after the last token, their scale, and perhaps the greedy continuation."""

    token_ids: tuple[int, ...]
    top: tuple[tuple[int, float], ...]
    max_abs: float
    greedy: tuple[int, ...]


@dataclass(frozen=True)
class CaseReport:
    """One case: `difference` is max |logit - reference| over max |reference|, of the stored logits.

    `top1`: the largest logit is the reference's. `continued`: how many of the stored greedy tokens, each after those
    before it, were the model's choice too, or within twice the tolerance of it. `ok` allows a different largest logit
    only where the reference's two largest are that close.
    """

    tokens: int
    difference: float
    top1: bool
    continued: int
    continuation: int
    ok: bool


@dataclass(frozen=True)
class VerifyReport:
    """All cases; `ok` when every one is. Prints as a table."""

    cases: tuple[CaseReport, ...]
    tolerance: float
    reference: str

    @property
    def ok(self) -> bool:
        """Whether the package computes what was stored with it."""
        return all(case.ok for case in self.cases)

    @property
    def difference(self) -> float:
        """The largest difference of all cases."""
        return max((case.difference for case in self.cases), default=0.0)

    @property
    def top1_agreement(self) -> float:
        """The share of cases whose largest logit is the reference's."""
        return sum(case.top1 for case in self.cases) / len(self.cases) if self.cases else 1.0

    def __str__(self) -> str:
        lines = [f"reference: {self.reference}; largest accepted difference {self.tolerance:g}"]
        for i, case in enumerate(self.cases):
            greedy = f", greedy {case.continued}/{case.continuation}" if case.continuation else ""
            verdict = "ok" if case.ok else "DIFFERS"
            lines.append(
                f"case {i}: {case.tokens} tokens, difference {case.difference:.3g}, "
                f"top-1 {'agrees' if case.top1 else 'differs'}{greedy}: {verdict}"
            )
        lines.append(f"{'ok' if self.ok else 'DIFFERS'}: {sum(c.ok for c in self.cases)} of {len(self.cases)} cases")
        return "\n".join(lines)


def read_checks(document: Field, vocab_size: int, longest: int) -> tuple[list[Case], float, str]:
    """Validate checks.json: its cases, tolerance and reference. Raises `ModelError`."""
    cases = []
    for field in document.key("cases").items():
        top = []
        for pair in field.key("top").items():
            token, logit = pair.items(2)
            top.append((token.integer(0, vocab_size - 1), logit.number()))
        token_ids = tuple(_token_ids(field.key("token_ids"), vocab_size))
        if not 0 < len(token_ids) <= longest:
            field.key("token_ids").fail(f"from 1 to {longest} token ids")
        if not top or any(a[1] < b[1] for a, b in itertools.pairwise(top)):
            field.key("top").fail("logits with their tokens, the largest first")
        greedy = field.optional("greedy")
        continuation = tuple(_token_ids(greedy, vocab_size))[: longest - len(token_ids)] if greedy else ()
        cases.append(Case(token_ids, tuple(top), field.key("max_abs").number(), continuation))
    return cases, document.key("tolerance").number(), document.key("reference").text()


def verify(engine: Engine, cases: Iterable[Case], tolerance: float, reference: str) -> VerifyReport:
    """Run every case."""
    return VerifyReport(tuple(_run(engine, case, tolerance) for case in cases), tolerance, reference)


def _run(engine: Engine, case: Case, tolerance: float) -> CaseReport:
    with engine.exclusive(), Sequence(engine) as sequence:
        row = sequence.prefill(case.token_ids).logits[0]
        scale = max(case.max_abs, float(np.finfo(np.float32).tiny))
        differences = [abs(float(row[token]) - logit) for token, logit in case.top]
        difference = max(differences) / scale if np.isfinite(differences).all() else float("inf")
        top1 = int(row.argmax()) == case.top[0][0]
        near = len(case.top) > 1 and case.top[0][1] - case.top[1][1] <= 2 * tolerance * scale
        continued = 0
        for token in case.greedy:
            continued += _is_choice(row, token, tolerance)
            row = sequence.step(token).logits[0]
        ok = difference <= tolerance and (top1 or near) and continued == len(case.greedy)
        return CaseReport(len(case.token_ids), difference, top1, continued, len(case.greedy), ok)


def _is_choice(row: Float32, token: int, tolerance: float) -> bool:
    return bool(row.max() - row[token] <= 2 * tolerance * np.abs(row).max())


def _token_ids(field: Field, vocab_size: int) -> Iterable[int]:
    return (item.integer(0, vocab_size - 1) for item in field.items())
