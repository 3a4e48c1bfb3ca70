"""Runs forward passes of a model, several at a time where that is faster."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from clipfilter_wds.models.precision import NARROW

P = ParamSpec("P")
T = TypeVar("T")

#: Batches that a CPU works on at a time, at most; each of them is in memory, with its activations.
_MOST_STREAMS = 4

#: On one thread, a batch of a model whose widest tower is at least this wide takes so long that an interrupt would seem
#: to be ignored. Its layers are split among all threads, as torch does.
_WIDE = 1024


class ForwardCancelledError(RuntimeError):
    """Nobody waits for the result any more."""


class ForwardPool:
    """Starts batches before the results of earlier ones are there.

    Attributes:
        num_ahead: Batches to start before the result of the first is waited for.
    """

    def __init__(self, threads: ThreadPoolExecutor | None, num_ahead: int) -> None:
        self._threads, self.num_ahead = threads, num_ahead
        self._closed = threading.Event()

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """Call a function, in its turn. Returns a function that waits for its result."""
        if self._threads is not None:
            return self._threads.submit(function, *args, **kwargs).result
        result = function(*args, **kwargs)
        return lambda: result

    def raise_if_cancelled(self) -> None:
        """To be called by what runs here, between two parts of its work.

        Raises:
            ForwardCancelledError: When nobody waits for the result any more.
        """
        if self._closed.is_set():
            raise ForwardCancelledError("the batches were closed while this one was computed")

    def close(self) -> None:
        """Cancel what runs, and wait for it to end."""
        self._closed.set()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)


@contextmanager
def forward_pool(device: torch.device, width: int) -> Iterator[ForwardPool]:
    """Open a ForwardPool for a model on a device, whose wider tower has this width.

    A GPU is given the next batch before the last is done. A CPU works on as many batches as torch has threads (up to
    four). Splitting each layer among all threads is slower: they wait for the slowest of them, layer by layer, which is
    the one that shares its core with a process that decodes. A small model's layers take too little time for that.
    """
    num_threads = torch.get_num_threads()
    num_streams = min(num_threads, _MOST_STREAMS)
    if device.type != "cpu":
        pool = ForwardPool(None, num_ahead=1)
    elif num_streams == 1 or not NARROW <= width < _WIDE:
        pool = ForwardPool(None, num_ahead=0)
    else:
        # As many wait as are computed, so that there is work while the oldest is computed again.
        pool = ForwardPool(_start_threads(num_streams, num_threads), num_ahead=2 * num_streams - 1)
    try:
        yield pool
    finally:
        pool.close()


def _start_threads(num_streams: int, num_threads: int) -> ThreadPoolExecutor:
    """Threads that share out those of torch."""
    threads, ready = ThreadPoolExecutor(num_streams, "clipfilter-forward"), threading.Barrier(num_streams + 1)

    def begin() -> None:
        torch.get_num_threads()  # else the first operation would, and take over the number of all threads to come
        torch.set_num_threads(num_threads // num_streams)
        ready.wait()

    for _ in range(num_streams):
        threads.submit(begin)
    ready.wait()
    torch.set_num_threads(num_threads)  # begin() has set the default of all threads that start from now on, too
    return threads
