"""Reads CPU time, user and system, of this process by thread and of its child processes by what they do."""

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

from torch.utils.data import Dataset

#: What child processes do. Of a DataLoader's, those that copy run a dataset of copies.
DECODING, COPYING, OTHER = "decoding", "copying", "other"

#: How threads are called here, by a part of their own names.
_THREADS = {"MainThread": "main", "_pin_memory_loop": "pin", "QueueFeeder": "feeder", "clipfilter-": ""}


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds since the processes began.

    Attributes:
        threads: Of this process, by thread, whether they have ended or not; those that Python knows nothing of are
            ``native``. Their sum is the process's.
        children: Of all processes that it has started, by what they do, whether they have ended or not.
    """

    threads: Mapping[str, float]
    children: Mapping[str, float]

    def __sub__(self, other: "CpuTimes") -> "CpuTimes":
        return CpuTimes(_difference(self.threads, other.threads), _difference(self.children, other.children))


def _difference(more: Mapping[str, float], less: Mapping[str, float]) -> dict[str, float]:
    return {name: more.get(name, 0.0) - less.get(name, 0.0) for name in {**more, **less}}


class Clocks:
    """Reads the kernel's clocks, which are exact to the nanosecond and cost a system call each.

    Creating one replaces three functions of the standard library in this process, to know what a process is started for
    and what threads and processes have used when they end. So create it in a process of its own, before others start.
    """

    def __init__(self) -> None:
        self._alive: dict[int, str] = {}
        self._ended: Counter[str] = Counter()
        self._ended_threads: Counter[str] = Counter()
        self._watch_starts()
        self._watch_ends()
        self._watch_threads()

    def _watch_starts(self) -> None:
        start = BaseProcess.start

        def start_and_note(process: BaseProcess) -> None:
            role = _role(process)  # before the process forgets what it was made of
            start(process)
            self._alive[process.pid] = role

        BaseProcess.start = start_and_note

    def _watch_ends(self) -> None:
        def wait_and_note(pid: int, flags: int) -> tuple[int, int]:
            ended, status, usage = os.wait4(pid, flags)
            if ended:
                self._ended[self._alive.pop(ended, OTHER)] += usage.ru_utime + usage.ru_stime
            return ended, status

        os.waitpid = wait_and_note

    def _watch_threads(self) -> None:
        start = threading.Thread.start

        def start_and_note(thread: threading.Thread) -> None:
            run = thread.run

            def run_and_note() -> None:
                try:
                    run()
                finally:
                    self._ended_threads[_short(thread.name)] += time.thread_time()

            thread.run = run_and_note
            start(thread)

        threading.Thread.start = start_and_note

    def read(self) -> CpuTimes:
        """What all have used until now."""
        threads = self._ended_threads + _python_threads()
        threads["native"] = time.process_time() - sum(threads.values())
        children = Counter({DECODING: 0.0, COPYING: 0.0, OTHER: 0.0})
        children.update(self._ended)
        for pid, role in [*self._alive.items()]:
            children[role] += _seconds(pid, _PROCESS)
        return CpuTimes(threads, children)


def _role(process: BaseProcess) -> str:
    if getattr(process._target, "__module__", "").startswith("concurrent."):
        return COPYING
    for argument in process._args:
        dataset = argument[0] if isinstance(argument, list) and argument else argument  # torch 2.14 has it in a list
        if isinstance(dataset, Dataset):
            return COPYING if "Cop" in type(getattr(dataset, "_dataset", dataset)).__name__ else DECODING
    return OTHER


def _python_threads() -> Counter[str]:
    seconds: Counter[str] = Counter()
    for thread in threading.enumerate():
        if thread.native_id is not None:
            seconds[_short(thread.name)] += _seconds(thread.native_id, _THREAD)
    return seconds


def _short(name: str) -> str:
    for part, short in _THREADS.items():
        if part in name:
            name = short or name.removeprefix(part)
    return re.sub(r"[-_ ]*\d+$", "", name)


#: The kernel's names of the clock of a process, and of a thread of this process: see clock_getcpuclockid(3).
_PROCESS, _THREAD = 2, 6


def _seconds(number: int, kind: int) -> float:
    try:
        return time.clock_gettime(~number << 3 | kind)
    except OSError:  # it has ended just now
        return 0.0
