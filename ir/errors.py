"""The one family of errors that llmc raises on purpose: what, where, why, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlmcError(Exception):
    """A mistake in what llmc was given. The message is one clear sentence or a few, without a traceback's help."""


class TypeMismatch(LlmcError):
    """An op was given operands that it does not take."""


class VerificationError(LlmcError):
    """A graph breaks a rule of the IR; raised by `verify`, naming the node and its neighbours."""


class ParseError(LlmcError):
    """The text form of a graph, or a pipeline string, could not be read; names the line."""


class NoKernel(LlmcError):
    """A node has no kernel on this backend and cannot be decomposed into nodes that have one."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'x'?`, or the list of choices, if it is short, when nothing is near."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(known) > 24:
        return f"{len(known)} are known, none near"
    return f"known: {', '.join(known)}" if known else "there is none"
