"""Interrupts that no library can swallow: one was lost now and then inside a callback from compiled code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_noticed() -> Iterator[Callable[[], None]]:
    """Inside, an interrupt raises `KeyboardInterrupt` as always and is remembered as well: the function that is given
    raises it again, for whoever is about to do something that an interrupt should have prevented.

    Outside the main thread, and where the process ignores interrupts, nothing is changed.
    """
    pending = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        pending = True
        raise KeyboardInterrupt

    def check() -> None:
        if pending:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield check
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
