"""Runs a dataset in worker processes: starts them, notices when one dies, and ends them promptly."""

import copy
import fcntl
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawValue
from typing import Any, TypeVar

import torch
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from clipfilter_wds.workers.crashes import CrashTracker, LostBatchError, WorkerDiedError
from clipfilter_wds.workers.deaths import GRACE_SECONDS, DeathWatch
from clipfilter_wds.workers.memory import check_fits
from clipfilter_wds.workers.process import init_worker, starting
from clipfilter_wds.workers.slots import SLOTS_PER_WORKER, Slots
from clipfilter_wds.workers.transport import Delivery, Message, SendingItems, SendingStream

T = TypeVar("T")

#: Seconds until a worker's death, or a call of ``stop``, is noticed, at most.
_POLL_SECONDS = 0.25
#: Seconds that a batch may be on its way, which takes a worker that is not stopped milliseconds.
_LOST_SECONDS = 60.0
#: Size of the pipe that workers send batches through (without large tensors): the most that Linux grants every user.
_PIPE_BYTES = 1 << 20


class WorkersStoppedError(RuntimeError):
    """The workers were stopped while a batch was waited for."""


def worker_loader(
    dataset: Dataset[T],
    *,
    num_workers: int,
    lend: bool = False,
    batch_bytes: int = 0,
    requests: Iterable[Any] | None = None,
    in_order: bool = True,
    persistent_workers: bool = False,
    multiprocessing_context: str | None = None,
    tracker: CrashTracker | None = None,
) -> Iterable[Any]:
    """A dataset's batches, as they are, from ``num_workers`` processes (0: from this one).

    Args:
        dataset: Yields batches; or, where there are ``requests``, makes one of each.
        num_workers: Processes that run the dataset.
        lend: Give what comes out of workers as :class:`Lent`, in the memory that they share with this process, which
            they wait for: a batch has to be released before the one after the next is asked for. Else it is copied.
        batch_bytes: Size of the views of a batch, where it is known: whether they have room is checked.
        requests: Drawn in this process, a few ahead of the batches.
        in_order: Take the workers' batches in turn, or in the order of the requests; else as they come.
        persistent_workers: Keep the processes when the loader is iterated again.
        multiprocessing_context: How processes are started: ``fork``, ``spawn``, ``forkserver``, None for the default.
        tracker: The one that the dataset's workers report to; a worker's death then raises ``WorkerDiedError``.

    Raises:
        ValueError: When the batches of all workers do not fit in memory.
        OSError: From the iteration, when the system can't start so many processes.
    """
    num_slots = num_workers * SLOTS_PER_WORKER
    check_fits(
        num_slots * batch_bytes,
        f"{num_workers} workers prepare {num_slots} batches at a time; fewer num_workers or a smaller batch_size help",
    )
    if not num_workers:
        return DataLoader(dataset, sampler=requests, batch_size=None)
    return WorkerLoader(
        SendingStream(dataset) if isinstance(dataset, IterableDataset) else SendingItems(dataset),
        tracker=tracker,
        lend=lend,
        sampler=requests,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=init_worker,
        persistent_workers=persistent_workers,
        prefetch_factor=2,
        in_order=in_order,
        multiprocessing_context=multiprocessing_context,
    )


class WorkerLoader(DataLoader[Any]):
    """A DataLoader whose workers send through slots of shared memory. Made by :func:`worker_loader`."""

    def __init__(
        self, dataset: SendingStream | SendingItems, *, tracker: CrashTracker | None, lend: bool, **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        self._sending, self._tracker, self._lend = dataset, tracker, lend

    def close(self) -> None:
        """End persistent workers."""
        if isinstance(self._iterator, WorkerIterator):
            self._iterator.close()
            self._iterator = None

    def _get_iterator(self) -> "WorkerIterator":
        self.multiprocessing_context = _without_locks(self.multiprocessing_context)
        with starting():
            slots = self._sending.open_slots(self.num_workers, page_locked=self._lend and torch.cuda.is_available())
            return WorkerIterator(self, self._tracker, slots, lend=self._lend)


def _without_locks(context: BaseContext | None) -> BaseContext:
    """The context, with events that no process can hold locked when it is killed."""
    context = copy.copy(context or multiprocessing.get_context())
    context.Event = _Flag  # type: ignore[method-assign, assignment]  # all of an event that torch uses
    return context


class _Flag:
    """An event without a lock, by which torch tells workers to end.

    A worker that is killed while it holds the lock of an ordinary event keeps its parent waiting for ever.
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
    """The iterator of what :func:`worker_loader` gives, closed at the end of the block: its processes are gone then.

    Otherwise they would live as long as the iterator, and an exception's traceback may hold that for long.
    """
    iterator = iter(batches)
    try:
        yield iterator
    finally:
        if hasattr(iterator, "close"):  # DataLoader's own, which runs a dataset in this process, has nothing to end
            iterator.close()


class WorkerIterator(_MultiProcessingDataLoaderIter, Iterator[Any]):
    """A DataLoader's iterator that can be stopped at any time and says which sample a worker that died was at."""

    _shutdown = True  # until torch has something to end

    def __init__(self, loader: WorkerLoader, tracker: CrashTracker | None, slots: Slots, *, lend: bool) -> None:
        self._tracker, self._slots, self._lend = tracker, slots, lend
        self._watch: DeathWatch | None = None
        self._is_stopped = False
        self._num_come = [0] * slots.num_workers
        self._missed_since: dict[int, float] = {}
        self._workers_status = [True] * slots.num_workers  # torch asks for it where it could not start all of them
        try:
            super().__init__(loader)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Any:
        """The next item."""
        try:
            delivery = super().__next__()
        except StopIteration:
            for worker, num_come in enumerate(self._num_come):
                if self._slots.num_made[worker] != num_come:
                    raise LostBatchError(worker) from None
            raise
        return delivery if self._lend else delivery.take()

    def close(self) -> None:
        """End the workers within a second."""
        self._shutdown_workers()

    def stop(self) -> None:
        """Have ``next`` raise ``WorkersStoppedError``, also in a thread that waits in it.

        Persistent workers can be iterated again afterwards.
        """
        self._is_stopped = True

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        if first_iter:  # the workers have been given nothing to do yet
            _widen(self._worker_result_queue)
            if self._tracker is not None:
                self._keep_watch(self._tracker)
        self._is_stopped = False
        super()._reset(loader, first_iter)

    def _keep_watch(self, tracker: CrashTracker) -> None:
        if self._worker_pids_set:  # else torch raises from a signal handler, at whatever line the main thread is
            _remove_worker_pids(id(self))
            self._worker_pids_set = False
        self._watch = DeathWatch(self._workers, tracker)
        self._worker_result_queue._writer.close()  # type: ignore[attr-defined]  # so that only workers hold it
        self._watch.start()

    def _get_data(self) -> Any:
        """Wait for what any of the workers sends, looking out for deaths and for ``stop``."""
        # When the main thread ends, the program is ending, and waits for the other threads.
        while not self._is_stopped and threading.main_thread().is_alive():
            try:
                has_come, data = self._try_get_data(_POLL_SECONDS)  # type: ignore[no-untyped-call]  # of the base class
            except (RuntimeError, OSError, EOFError) as error:
                if (death := self._death(0.0 if isinstance(error, RuntimeError) else 1.0)) is None:
                    raise
                self._shutdown_workers()
                raise death from error
            if has_come:
                return self._received(*data)
            self._check_lost()
        raise WorkersStoppedError("the workers were stopped")

    def _received(self, number: int, item: Any) -> tuple[int, Any]:
        """What has come, with a delivery for a message; the rest is for the base class."""
        if not isinstance(item, Message):
            return number, item
        self._num_come[item.worker] += 1
        if item.number != self._num_come[item.worker]:
            raise LostBatchError(item.worker)
        return number, Delivery(item, self._slots)

    def _check_lost(self) -> None:
        """See that what workers have made comes; nothing is on its way now."""
        now = time.monotonic()
        for worker, num_come in enumerate(self._num_come):
            if self._slots.num_made[worker] == num_come:
                self._missed_since.pop(worker, None)
            elif now - self._missed_since.setdefault(worker, now) > _LOST_SECONDS:
                raise LostBatchError(worker)

    def _death(self, seconds: float) -> WorkerDiedError | None:
        """The death of a worker, waited for a while: what a dying one has sent can't be received any more."""
        until = time.monotonic() + seconds
        death = None
        while self._watch and (death := self._watch.find()) is None and time.monotonic() < until:
            time.sleep(0.01)
        return death

    def _shutdown_workers(self) -> None:
        """End the workers (called by torch however an iteration ends).

        torch tells them to end, in an order that leaves none of its queues and threads hanging, then waits up to five
        seconds for one worker after another. Signals make them end sooner while it waits.
        """
        self._is_stopped = True
        if self._shutdown or sys.is_finalizing():
            return
        self._slots.close()
        ended = threading.Event()
        helper = threading.Thread(target=_end_soon, args=(self._workers, ended), name="clipfilter-end", daemon=True)
        helper.start()
        super()._shutdown_workers()
        if self._watch is not None:
            self._watch.stop()
        ended.set()  # not reached after a second Ctrl-C; the workers are ended all the same
        helper.join()


def _widen(queue: Any) -> None:
    """Enlarge a queue's pipe, where the system allows it, to hold what workers have ready.

    A worker that waits for room in the pipe has half a message there; killed then, it costs the others their work too.
    """
    with suppress(AttributeError, OSError):
        fcntl.fcntl(queue._writer.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _end_soon(workers: Sequence[BaseProcess], ended: threading.Event) -> None:
    for end in (BaseProcess.terminate, BaseProcess.kill):
        if ended.wait(GRACE_SECONDS):
            return
        for worker in workers:
            end(worker)
