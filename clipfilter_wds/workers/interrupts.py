"""Sees to it that SIGTERM, which a scheduler sends before it kills, and Ctrl-C end what they are to end."""

import signal
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

#: Seconds after which a signal whose exception Python has ignored is sent again.
_SOON = 0.05


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has come."""


_ERRORS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: TerminatedError}


@contextmanager
def interrupted_by(*signals: int) -> Iterator[None]:
    """Have the first of these signals interrupt this block; those after it must not cut short what it ends.

    SIGTERM raises :class:`TerminatedError`, SIGINT ``KeyboardInterrupt``. Python ignores what is raised in a
    destructor, and in what it calls behind a fork: an interrupt of such a moment is raised once more, also that of a
    SIGINT that is not among ``signals``. In any thread but the main one, which has all signals, this does nothing.
    """
    if not _is_main_thread():
        yield
        return
    before, hook_before = {number: signal.getsignal(number) for number in signals}, sys.unraisablehook
    sending: list[threading.Timer] = []

    def answer(number: int, frame: object) -> NoReturn:
        _handle(signals, _pass)
        raise _ERRORS[number]

    def send_again(ignored: Any) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt) or not _is_main_thread():
            hook_before(ignored)
            return
        _handle(signals, answer)
        number = signal.SIGTERM if issubclass(ignored.exc_type, TerminatedError) else signal.SIGINT
        # Not here, where it would be ignored as well.
        sending.append(threading.Timer(_SOON, signal.pthread_kill, (threading.get_ident(), number)))
        sending[-1].daemon = True
        sending[-1].start()

    _handle(signals, answer)
    sys.unraisablehook = send_again
    try:
        yield
    finally:
        for timer in sending:
            timer.cancel()
        sys.unraisablehook = hook_before
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _handle(signals: Collection[int], handler: Any) -> None:
    for number in signals:
        signal.signal(number, handler)


def _pass(number: int, frame: object) -> None:
    """Ignore a signal; with SIG_IGN, Python would print a traceback of one that comes at the same time."""
