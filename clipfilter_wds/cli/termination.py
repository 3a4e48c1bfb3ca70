"""Ends a command on SIGTERM, which a scheduler sends before it kills, as on Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Have SIGTERM raise :class:`TerminatedError` in this block. Only the main thread can have signals at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the run is ending, and a second one must not cut that short
    raise TerminatedError
