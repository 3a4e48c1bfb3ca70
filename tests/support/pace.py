"""Measures time in a way that holds on a busy machine too."""

import resource
import sys
import time
from typing import Self

import psutil

#: Seconds to wait at most for what comes soon. It keeps a test from hanging, and says nothing of speed.
FOREVER = 250.0


class Stopwatch:
    """Tells time as it would pass on an idle machine.

    Beside the block runs a process that does nothing but spin. How much slower than on an idle machine work gets done
    is how much longer than its CPU seconds that process has been there. Waiting gets no slower.
    """

    def __enter__(self) -> Self:
        self._spinner = psutil.Popen([sys.executable, "-ES", "-c", "while True: pass"])
        self._began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._spinner.kill()
        self._spinner.wait()

    def seconds(self, cpu_seconds: float | None = None) -> float:
        """Since the block began, on an idle machine; ``cpu_seconds`` of it were work, by default all of it."""
        elapsed, spun = time.monotonic() - self._began, sum(self._spinner.cpu_times()[:2])
        if cpu_seconds is None:
            return spun
        return elapsed - cpu_seconds * (elapsed / spun - 1)


def cpu_seconds_of_children() -> float:
    """CPU seconds of the processes that this one has started and waited for, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
