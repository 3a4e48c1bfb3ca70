"""Scores batches ahead, in a thread of its own, so that scoring and training overlap."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

from clipfilter_wds.workers.pool import WorkerIterator, WorkersStoppedError

T = TypeVar("T")
S = TypeVar("S")

#: Seconds until the thread notices that the program is ending, at most.
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class _End:
    """Comes behind the last item, with what was raised, if anything."""

    error: BaseException | None = None


class Prefetcher(Iterator[S], Generic[T, S]):
    """Runs items through a function, in a thread that is a few ahead of its consumer.

    What the iterable or the function raises is raised again where the item would have been taken. What is ``cuda`` to
    the caller is ``cuda`` to the thread.

    Args:
        items: Iterated in the thread; its iterator is made in the caller's, since that may start processes.
        apply: Items -> what comes out; a generator, mostly.
        depth: How many items to be ahead.
        keep: Leave the iterable's processes running, to be iterated again.
    """

    def __init__(
        self, items: Iterable[T], apply: Callable[[Iterator[T]], Iterator[S]], *, depth: int = 2, keep: bool = False
    ) -> None:
        self._iterator = iter(items)
        self._applied, self._keep = apply(self._iterator), keep
        self._made: SimpleQueue[S | _End] = SimpleQueue()
        self._room = threading.Semaphore(depth)
        self._is_closed = False
        # A new thread's is the first GPU, on which each rank's thread would take memory.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, name="clipfilter-scorer")
        self._thread.start()

    def _run(self) -> None:
        end = _End()
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            while self._wait_for_room():
                self._made.put(next(self._applied))
        except (StopIteration, WorkersStoppedError):
            pass
        except BaseException as error:  # noqa: BLE001  # raised again where the item is taken
            end = _End(error)
        self._made.put(end)
        del end  # which holds this frame, by its error's traceback

    def _wait_for_room(self) -> bool:
        """Whether another item is wanted. A program that ends while this is open waits for the thread first."""
        while not self._is_closed and threading.main_thread().is_alive():
            if self._room.acquire(timeout=_POLL_SECONDS):
                return not self._is_closed
        return False

    def __next__(self) -> S:
        """The next item, until the iterable ends."""
        item = self._made.get()
        if not isinstance(item, _End):
            self._room.release()
            return item
        self._made.put(_End())
        if item.error is not None:
            raise item.error
        raise StopIteration

    def close(self) -> None:
        """Stop, wait for the item that is being scored, and let go of the iterable and its processes."""
        self._is_closed = True
        self._room.release()
        iterator = self.__dict__.pop("_iterator", None)
        if isinstance(iterator, WorkerIterator):
            iterator.stop()  # what workers are at is not waited for
        self._thread.join()
        while not self._made.empty():
            self._made.get()  # scored ahead and not taken; it may be in memory shared with workers, which takes files
        self._made.put(_End())
        # A DataLoader ends its workers when its iterator is let go of, but an exception's traceback may still hold it.
        self.__dict__.pop("_applied", None)
        if not self._keep and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
