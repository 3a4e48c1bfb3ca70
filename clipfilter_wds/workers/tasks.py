"""Runs tasks in a few processes, which are killed when nobody waits for the results any more."""

import copy
import multiprocessing
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, ParamSpec, Self, TypeVar

from clipfilter_wds.workers.crashes import WorkerDiedError
from clipfilter_wds.workers.process import init_worker, starting

P = ParamSpec("P")
T = TypeVar("T")


#: Seconds that running tasks have to end when nobody waits for their results any more.
_LAST_SECONDS = 1.5
#: Seconds that processes have to end after one of them has died.
_GRACE_SECONDS = 1.0


class TaskDiedError(WorkerDiedError):
    """A process that runs tasks died."""

    def __str__(self) -> str:
        return f"a process that writes shards died ({self.cause})"


class TaskProcesses:
    """Processes that run picklable functions. Use it in a ``with`` block, at whose end all is done.

    When the block ends with an exception, what has not begun is never run, and what takes long is killed: a slow
    storage may take minutes, and Ctrl-C shall not.

    Args:
        num_processes: How many run at a time.
    """

    def __init__(self, num_processes: int) -> None:
        self._processes: list[BaseProcess] = []
        context: Any = copy.copy(multiprocessing.get_context())
        start = context.Process

        def process(*args: Any, **kwargs: Any) -> BaseProcess:
            self._processes.append(start(*args, **kwargs))
            return self._processes[-1]

        context.Process = process
        self._executor = ProcessPoolExecutor(num_processes, context, initializer=_init)

    def submit(self, task: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Have a function run; :meth:`result` waits for what it returns."""
        return self._executor.submit(task, *args, **kwargs)

    def result(self, future: "Future[T]") -> T:
        """What a task returns or raises.

        Raises:
            TaskDiedError: When a process died.
        """
        try:
            return future.result()
        except BrokenProcessPool as error:
            until = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < until and any(process.exitcode is None for process in self._processes):
                time.sleep(0.01)  # the executor's own thread is about to learn of the ends
            # The executor itself has sent the others SIGTERM.
            codes = sorted((process.exitcode for process in self._processes if process.exitcode), key=_is_sigterm)
            raise TaskDiedError(None, codes[0] if codes else None) from error

    def __enter__(self) -> Self:
        try:
            with starting():
                self._executor.submit(int)  # starts processes now, while this one has few threads
        except BaseException:  # at its end, the program would wait for those that have been started
            self._executor.shutdown(wait=False)
            self._end(0.0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        self._executor.shutdown(wait=kind is None, cancel_futures=kind is not None)
        if kind is not None:
            self._end(_LAST_SECONDS)

    def _end(self, seconds: float) -> None:
        """Kill what has not ended by then."""
        until = time.monotonic() + seconds
        for process in self._processes:
            if process.pid is not None:  # else the system did not start it
                process.join(max(0.0, until - time.monotonic()))
                process.kill()


def _init() -> None:
    init_worker(0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever the parent does with it; DataLoader's workers have torch's


def _is_sigterm(exit_code: int) -> bool:
    return exit_code == -signal.SIGTERM
