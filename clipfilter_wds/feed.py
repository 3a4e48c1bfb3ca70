"""Batches scored ahead, in a thread of their own, so that scoring and training overlap."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")


class Feed(Generic[T, S]):
    """Runs items through a function, a few ahead of whoever takes what comes out.

    What the iterable or the function raises is raised again where the item would have been taken.

    Args:
        items: Iterated in the feed's thread; its iterator is made in this one, since that may start processes.
        apply: Items -> what is fed; a generator, mostly.
        depth: How many items to be ahead.
        keep: Leave the iterable's processes for the next one who iterates it.
    """

    def __init__(
        self, items: Iterable[T], apply: Callable[[Iterator[T]], Iterator[S]], *, depth: int = 2, keep: bool = False
    ) -> None:
        self._iterator = iter(items)
        self._applied, self._keep = apply(self._iterator), keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="clipfilter-scorer")
        self._ahead: deque[Future[S]] = deque(self._thread.submit(self._step) for _ in range(depth))

    def _step(self) -> S:
        return next(self._applied)

    def __iter__(self) -> Iterator[S]:
        """The fed items, until the iterable ends."""
        while self._ahead:
            future = self._ahead.popleft()
            try:
                item = future.result()
            except StopIteration:
                return
            self._ahead.append(self._thread.submit(self._step))
            yield item

    def close(self) -> None:
        """Stop, wait for the item that is being made, and let go of the iterable and its processes."""
        for future in self._ahead:
            future.cancel()
        self._thread.shutdown(wait=True)
        self._ahead.clear()
        # A DataLoader ends its workers when its iterator is let go of, but an exception's traceback may still hold it.
        self.__dict__.pop("_applied", None)
        iterator = self.__dict__.pop("_iterator", None)
        if not self._keep and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
