"""Forward passes of a model, several at a time where that is faster."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from clipfilter_wds.models.precision import NARROW

P = ParamSpec("P")
T = TypeVar("T")

#: Batches that a processor works on at a time, at most; each of them is in memory, with its activations.
_MOST_STREAMS = 4

#: On one thread, a batch of a model whose widest tower is at least this wide takes so long that an interrupt would seem
#: to be ignored. Its layers are split among all threads, as torch does.
_WIDE = 1024

_here = threading.local()


class ForwardCancelledError(RuntimeError):
    """Nobody waits for the result any more."""


def raise_if_cancelled() -> None:
    """Between two parts of a batch: end here if nobody waits for the result any more.

    Raises:
        ForwardCancelledError: Then.
    """
    if (is_closed := getattr(_here, "is_closed", None)) and is_closed.is_set():
        raise ForwardCancelledError("the batches were closed while this one was worked on")


class ForwardPool:
    """Where batches are begun before the results of earlier ones are there.

    Attributes:
        num_ahead: Batches to begin before the result of the first is waited for.
    """

    def __init__(self, pool: Executor | None, num_ahead: int) -> None:
        self._pool, self.num_ahead = pool, num_ahead

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """Call a function, in its turn; what comes back waits for its result."""
        if self._pool is not None:
            return self._pool.submit(function, *args, **kwargs).result
        result = function(*args, **kwargs)
        return lambda: result


@contextmanager
def forward_pool(device: torch.device, width: int) -> Iterator[ForwardPool]:
    """ForwardPool for a model on a device, with towers of this width.

    A GPU is given the next batch before the last is done. A processor works on as many batches as it has threads (up to
    four), instead of splitting each layer among all threads, which then wait for the slowest of them, layer by layer:
    the one that shares its core with a process that decodes. A small model's layers take too little time for that.
    When the block ends, what is worked on ends at its next :func:`raise_if_cancelled`.
    """
    num_threads = torch.get_num_threads()
    num_streams = min(num_threads, _MOST_STREAMS)
    if device.type != "cpu":
        yield ForwardPool(None, num_ahead=1)
    elif num_streams == 1 or not NARROW <= width < _WIDE:
        yield ForwardPool(None, num_ahead=0)
    else:
        is_closed = threading.Event()
        pool = _pool(num_streams, num_threads, is_closed)
        try:
            # As many wait as are worked on, so that there is work while the oldest is computed again.
            yield ForwardPool(pool, num_ahead=2 * num_streams - 1)
        finally:
            is_closed.set()
            pool.shutdown(cancel_futures=True)


def _pool(num_streams: int, num_threads: int, is_closed: threading.Event) -> ThreadPoolExecutor:
    """Threads that share out those of torch."""
    pool, ready = ThreadPoolExecutor(num_streams, "clipfilter-forward"), threading.Barrier(num_streams + 1)

    def begin() -> None:
        torch.get_num_threads()  # else the first operation would, and take over the number of all threads to come
        torch.set_num_threads(num_threads // num_streams)
        _here.is_closed = is_closed
        ready.wait()

    for _ in range(num_streams):
        pool.submit(begin)
    ready.wait()
    torch.set_num_threads(num_threads)  # it was set for this thread's like, too: those that begin from now on
    return pool
