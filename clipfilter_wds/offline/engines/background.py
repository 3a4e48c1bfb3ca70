"""Runs functions in a thread, one after another."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, Self, TypeVar

T = TypeVar("T")

#: Seconds that a run which is stopped waits for the function that is running.
_GRACE_SECONDS = 1.5


class Background(Generic[T]):
    """A thread that runs what it is given, in order. Use it in a ``with`` block, which ends when all is done.

    When the block ends with an exception, what has not begun is never run; and what takes long is left behind, also by
    the end of the program, since a slow storage may take minutes and Ctrl-C shall not.
    """

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = SimpleQueue()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def submit(self, task: Callable[[], T]) -> "Future[T]":
        """Have a function run."""
        future: Future[T] = Future()
        self._tasks.put((future, task))
        return future

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None and not self._is_stopped:
            future, task = item
            try:
                future.set_result(task())
            except BaseException as error:  # noqa: BLE001  # raised again where the result is taken
                future.set_exception(error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: Any) -> None:
        self._is_stopped = kind is not None
        self._tasks.put(None)
        self._thread.join(_GRACE_SECONDS if self._is_stopped else None)
