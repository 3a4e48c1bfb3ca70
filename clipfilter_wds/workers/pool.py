"""Processes that read and decode for this one: start them, know when one dies, and end them soon."""

import copy
import fcntl
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from types import TracebackType
from typing import Any, TypeVar

from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from clipfilter_wds.workers.crashes import CrashTracker, WorkerDiedError

T = TypeVar("T")

#: Seconds until it is noticed that a worker died, or that nobody waits for a batch any more; at most.
_POLL_SECONDS = 0.25
#: Seconds that workers have to end by themselves, and again when they are told to by a signal.
_GRACE_SECONDS = 0.5
#: What workers may have ready, tensors apart: as much as Linux grants anybody.
_PIPE_BYTES = 1 << 20
#: Seconds until a worker notices that its parent is gone.
_PARENT_SECONDS = 1.0


class WorkersStoppedError(RuntimeError):
    """Nobody waits for the batch any more."""


def worker_loader(
    dataset: Dataset[T],
    *,
    num_workers: int,
    pin_memory: bool = False,
    requests: Iterable[Any] | None = None,
    in_order: bool = True,
    persistent_workers: bool = False,
    multiprocessing_context: str | None = None,
    tracker: CrashTracker | None = None,
) -> Iterable[T]:
    """Hands the dataset's batches on as they are, from ``num_workers`` processes (0: from this one).

    Args:
        dataset: Yields batches; or makes one of whatever it is asked for, when there are ``requests``.
        num_workers: Processes that run the dataset.
        pin_memory: Put tensors in page-locked memory.
        requests: Drawn in this process, a few ahead of the batches.
        persistent_workers: Keep the processes when the loader is iterated again.
        in_order: Take the workers' batches in turn, or in the order of the requests; else as they come.
        multiprocessing_context: How processes are started: ``fork``, ``spawn``, ``forkserver``, None for the default.
        tracker: What the dataset's workers write what they are at to. A worker's death is then a
            ``WorkerDiedError``.
    """
    return _Loader(
        tracker,
        dataset,
        sampler=requests,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker if num_workers else None,
        persistent_workers=persistent_workers,
        prefetch_factor=2 if num_workers else None,
        in_order=in_order,
        multiprocessing_context=multiprocessing_context if num_workers else None,
    )


class _Loader(DataLoader[T]):
    def __init__(self, tracker: CrashTracker | None, dataset: Dataset[T], **options: Any) -> None:
        super().__init__(dataset, **options)
        self.tracker = tracker

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.multiprocessing_context = _without_locks(self.multiprocessing_context)
        return WorkerIterator(self)


def _without_locks(context: BaseContext | None) -> BaseContext:
    """A way to start processes whose events no killed one can hold."""
    context = copy.copy(context or multiprocessing.get_context())
    context.Event = _Flag  # type: ignore[method-assign, assignment]  # all of an event that torch uses
    return context


class _Flag:
    """An event without a lock; torch asks whether workers are to end before each batch, and tells them to once.

    A worker that was killed with that lock in its hands would keep its parent waiting for ever.
    """

    def __init__(self) -> None:
        self._cell = RawValue("b", 0)

    def set(self) -> None:
        """Set it, for all processes."""
        self._cell.value = 1

    def is_set(self) -> bool:
        """Whether any process has set it."""
        return bool(self._cell.value)


@contextmanager
def iterating(batches: Iterable[T]) -> Iterator[Iterator[T]]:
    """The iterator of a :func:`worker_loader`, whose processes are gone when the block ends.

    Without it they would be when the iterator is let go of, but an exception's traceback may hold it for long.
    """
    iterator = iter(batches)
    try:
        yield iterator
    finally:
        if isinstance(iterator, WorkerIterator):
            iterator.close()


# --- in the workers ---


def _init_worker(worker: int) -> None:
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # a worker is one core's worth of work
    # Ctrl-C goes to every process of a terminal; only the parent answers it, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever the parent does with it
    sys.excepthook = _tell_unless_parent_went
    gc.freeze()  # a collection would write to all that was there before the fork, and so copy it
    threading.Thread(target=_end_with_parent, name="clipfilter-parent", daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone, whatever it is at.

    torch's own look at the parent comes between two batches only, and a process that has more to hand over than its
    pipe holds then waits for ever, since the other workers have the pipe's other end as well.
    """
    parent, starter = multiprocessing.parent_process(), os.getppid()
    # The starter may be a fork server, or already be gone; but the parent of forked workers is told late to be dead.
    while os.getppid() == starter and (parent is None or parent.is_alive()):
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _tell_unless_parent_went(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Keep quiet when the parent is stopped while a worker hands it a tensor, in a thread of multiprocessing's."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


# --- in the parent ---


class WorkerIterator(_MultiProcessingDataLoaderIter, Iterator[Any]):
    """A DataLoader's iterator that says what a worker was at when it died, and that can be stopped at any time."""

    def __init__(self, loader: _Loader[Any]) -> None:
        self._tracker = loader.tracker
        self._watch: _Watch | None = None
        self._is_stopped = False
        super().__init__(loader)

    def close(self) -> None:
        """End the workers, now; it takes a second at most."""
        self._shutdown_workers()

    def stop(self) -> None:
        """Let a thread that waits for a batch do so no longer. Persistent workers can be iterated again afterwards."""
        self._is_stopped = True

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if first_iter:  # the workers have been given nothing to do yet
            _widen(self._worker_result_queue)
            if self._pin_memory:  # that thread waits for ever when it was sent half a message
                thread = self._pin_memory_thread
                # torch joins it without a limit
                thread.join = partial(thread.join, 2 * _GRACE_SECONDS)  # type: ignore[method-assign]
            if self._tracker is not None:
                self._keep_watch(self._tracker)
        self._is_stopped = False
        super()._reset(loader, first_iter)

    def _keep_watch(self, tracker: CrashTracker) -> None:
        if self._worker_pids_set:  # torch would raise from a signal handler, in whatever line the main thread is at
            _remove_worker_pids(id(self))
            self._worker_pids_set = False
        self._watch = _Watch(self._workers, tracker)
        if not self._pin_memory:  # else it is a thread that waits, and that can be left
            self._worker_result_queue._writer.close()  # type: ignore[attr-defined]  # so that workers alone write
            self._watch.start()

    def _get_data(self) -> Any:
        """Wait for what any of the workers sends, looking up often."""
        # The end of the main thread is the end of the program, which waits for the other threads.
        while not self._is_stopped and threading.main_thread().is_alive():
            try:
                has_come, data = self._try_get_data(_POLL_SECONDS)  # type: ignore[no-untyped-call]  # of the base class
                if not has_come and self._pin_memory and not self._pin_memory_thread.is_alive():
                    raise OSError("the thread that puts batches in page-locked memory has ended")
            except (RuntimeError, OSError, EOFError) as error:
                if (death := self._death(0.0 if isinstance(error, RuntimeError) else 1.0)) is None:
                    raise
                self._shutdown_workers()
                raise death from error
            if has_come:
                return data
        raise WorkersStoppedError("the workers were stopped")

    def _death(self, seconds: float) -> WorkerDiedError | None:
        """A death, also of a worker that is about to die: what it has sent can't be received from then on."""
        until = time.monotonic() + seconds
        death = None
        while self._watch and (death := self._watch.find()) is None and time.monotonic() < until:
            time.sleep(0.01)
        return death

    def _shutdown_workers(self) -> None:
        """End the workers; torch calls this at every end there is.

        torch tells them, in an order that leaves none of its queues and threads hanging, then waits up to five seconds
        for one worker after another. They are helped to end while it waits.
        """
        self._is_stopped = True
        if self._shutdown or sys.is_finalizing():
            return
        ended = threading.Event()
        helper = threading.Thread(target=_end_soon, args=(self._workers, ended), name="clipfilter-end", daemon=True)
        helper.start()
        super()._shutdown_workers()
        if self._watch is not None:
            self._watch.stop()
        ended.set()  # not reached when a second Ctrl-C strikes; the workers are ended all the same
        helper.join()


class _Watch:
    """Knows which worker died first, and lets none of the others outlive it.

    Whoever is killed while it sends may leave half a message in the pipe of all workers. Its reader waits for the other
    half until nobody is left who could write it.
    """

    def __init__(self, workers: Sequence[BaseProcess], tracker: CrashTracker) -> None:
        self._workers, self._tracker = workers, tracker
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._death: WorkerDiedError | None = None
        self._thread = threading.Thread(target=self._run, name="clipfilter-watch", daemon=True)

    def start(self) -> None:
        """Watch, in a thread that ends with the workers."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; the workers have ended."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():  # which may collect garbage
            self._thread.join(_GRACE_SECONDS)

    def _run(self) -> None:
        sentinels = {worker.sentinel for worker in self._workers}
        while sentinels and self.find() is None:
            sentinels -= set(wait(sentinels))
            if self._stopped.wait(_GRACE_SECONDS):  # what has been sent may be taken
                return
        if self.find() is not None:
            for worker in self._workers:
                worker.kill()

    def find(self) -> WorkerDiedError | None:
        """Of a worker that died, not of one that has ended because it was done."""
        with self._lock:  # also, since a process is told once only that its child ended
            if self._death is None:
                self._death = next((death for death in map(self._death_of, range(len(self._workers))) if death), None)
            return self._death

    def _death_of(self, worker: int) -> WorkerDiedError | None:
        sample, process = self._tracker.last_seen(worker), self._workers[worker]
        at_sample = sample is not None and sample.index is not None
        if process.is_alive() or (process.exitcode == 0 and not at_sample):
            return None
        return WorkerDiedError(sample, process.exitcode)


def _widen(queue: Any) -> None:
    """Let a queue of processes hold what workers have ready, where the system lets its pipe grow.

    A worker that waits for room in the pipe has half a message there; killed then, it costs the others their work too.
    """
    with suppress(AttributeError, OSError):
        fcntl.fcntl(queue._writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _end_soon(workers: Sequence[BaseProcess], ended: threading.Event) -> None:
    for end in (BaseProcess.terminate, BaseProcess.kill):
        if ended.wait(_GRACE_SECONDS):
            return
        for worker in workers:
            end(worker)
