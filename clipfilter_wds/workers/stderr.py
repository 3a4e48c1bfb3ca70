"""Keeps what C libraries write to stderr off the terminal while a worker decodes a sample."""

import faulthandler
import io
import os
import sys
from contextlib import suppress
from functools import cache
from typing import Any

_STDERR = 2


class QuietStderr:
    """Sends file descriptor 2 of this process to nowhere between ``begin`` and ``end``.

    libtiff alone writes a line or more for every odd image, and why an image is dropped is counted anyway. All that
    Python writes still comes: tracebacks, warnings, the log, and what ``faulthandler`` says of a crash.

    Raises:
        OSError: When there is no file descriptor 2.
    """

    def __init__(self) -> None:
        self._stderr = os.dup(_STDERR)
        self._nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stderr, sys.__stderr__):
            _redirect(stream, self._stderr)
        if faulthandler.is_enabled():
            faulthandler.disable()  # else it would leave the signals to torch, which took them when the worker began
            faulthandler.enable(file=self._stderr)

    def begin(self) -> None:
        """Send it to nowhere."""
        os.dup2(self._nowhere, _STDERR)

    def end(self) -> None:
        """Send it where it went before."""
        os.dup2(self._stderr, _STDERR)


@cache
def quiet_stderr() -> QuietStderr | None:
    """The one of this process, which must be a worker; None where it has no stderr."""
    if sys.__stderr__ is None:  # it was closed when Python started, and descriptor 2 may be any file by now
        return None
    try:
        return QuietStderr()
    except OSError:
        return None


def _redirect(stream: Any, descriptor: int) -> None:
    """Have a file that writes to file descriptor 2 write to another, for all who hold it, as loggers do."""
    with suppress(AttributeError, OSError, ValueError):  # there is none, or it was replaced by something else
        if stream.fileno() == _STDERR:
            stream.flush()
            raw = getattr(stream.buffer, "raw", stream.buffer)
            if isinstance(raw, io.FileIO):
                raw.__init__(descriptor, "w", closefd=False)  # type: ignore[misc]  # as if it were new
                raw.name = "<stderr>"
