"""An interrupt that was swallowed comes back."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from llmc.interrupts import interrupts_noticed


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_swallowed_interrupt_is_raised_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_noticed() as check:
        check()
        with contextlib.suppress(KeyboardInterrupt):
            interrupt()
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is before


def test_what_ignores_interrupts_goes_on_ignoring_them() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_noticed() as check:
            interrupt()
            check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_use_it() -> None:
    done: list[bool] = []

    def work() -> None:
        with interrupts_noticed() as check:
            check()
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
