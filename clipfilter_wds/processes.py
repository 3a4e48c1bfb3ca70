"""Processes that read and decode for this one: start them, and know what one was at when it died."""

import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import RawArray
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, get_worker_info

from clipfilter_wds.shards import public_url
from clipfilter_wds.types import DropReason, Sample, ShardError

T = TypeVar("T")

_log = logging.getLogger(__name__)

#: Seconds that a sample may take to decode.
DEFAULT_WORKER_TIMEOUT = 120.0
#: Seconds until a death is noticed, at most.
_POLL_SECONDS = 0.25
#: Deaths with no batch in between after which it is not a sample's fault.
_MAX_DEATHS_IN_A_ROW = 32


def check_worker_timeout(seconds: float) -> None:
    """Refuse what is no time.

    Raises:
        ValueError: When it is negative or not finite.
    """
    if not 0.0 <= seconds < float("inf"):
        raise ValueError(f"worker_timeout is {seconds:g}; it is a number of seconds, or 0 for no limit")


@dataclass(frozen=True, slots=True)
class Place:
    """A sample, or with no index the reading of its shard."""

    url: str
    index: int | None

    def __str__(self) -> str:
        url = repr(public_url(self.url))  # quoted, since a name may hold escape codes
        return f"reading {url}" if self.index is None else f"sample {self.index} of {url}"


class WorkerDiedError(RuntimeError):
    """A worker process died; the message says of what, and at which sample."""

    def __init__(self, place: Place | None, exit_code: int | None) -> None:
        super().__init__(place, exit_code)  # as they are, so that it can be pickled
        self.place, self.exit_code = place, exit_code

    def __str__(self) -> str:
        return f"a worker process died ({_cause(self.exit_code)}) at {self.place or 'its start'}"


def _cause(exit_code: int | None) -> str:
    if exit_code == -signal.SIGALRM:
        return "it took longer than worker_timeout"
    if exit_code == -signal.SIGKILL:
        return "SIGKILL, as the system sends when memory runs out"
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    return signal.Signals(-exit_code).name


class Deaths:
    """What workers died of. What kills one twice is left out from then on: a sample, or a whole shard."""

    def __init__(self) -> None:
        self._counts: Counter[Place] = Counter()
        self._in_a_row = 0
        self.left_out: set[Place] = set()

    def add(self, death: WorkerDiedError) -> None:
        """Count a death after which reading goes on.

        Raises:
            WorkerDiedError: When that is of no use, because workers die at once or everywhere.
        """
        self._in_a_row += 1
        if death.place is None or self._in_a_row > _MAX_DEATHS_IN_A_ROW:
            raise death
        self._counts[death.place] += 1
        if self._counts[death.place] > 1:
            self.left_out.add(death.place)
        _log.warning("%s; %s", death, "that is left out" if death.place in self.left_out else "trying once more")

    def outlived(self) -> None:
        """Note that a batch has come."""
        self._in_a_row = 0


class Whereabouts:
    """What each worker is at, in memory that outlives the worker.

    Args:
        urls: All shards that the workers read.
        num_workers: Processes that are watched; with 0, each keeps to itself what it is at.
        timeout: Seconds that one sample may take in a worker before its process is killed; 0 is for ever.
        left_out: What has killed workers before.
    """

    def __init__(
        self, urls: Sequence[str], num_workers: int, *, timeout: float = 0.0, left_out: Iterable[Place] = ()
    ) -> None:
        self._urls = list(urls)
        self._timeout = timeout
        self._left_out = frozenset(left_out)
        # Per worker the shard, counting from 1, and the sample, likewise; 0 where there is none.
        self._cells = RawArray("q", 2 * num_workers) if num_workers else [0, 0]
        self._num_workers = num_workers

    def place(self, worker: int) -> Place | None:
        """Where a worker is, or was when it died."""
        shard, sample = self._cells[2 * worker : 2 * worker + 2]
        return Place(self._urls[shard - 1], sample - 1 if sample else None) if shard else None

    def trail(self) -> "Trail":
        """For the process that calls it: where to leave what it is at."""
        info = get_worker_info()
        worker, timeout = (info.id, self._timeout) if info and self._num_workers else (0, 0.0)
        numbers = {url: number for number, url in enumerate(self._urls, start=1)}
        return Trail(self._cells, worker, numbers, timeout, self._left_out)


class Trail:
    """Where one worker leaves what it is at."""

    def __init__(
        self, cells: Any, worker: int, numbers: dict[str, int], timeout: float, left_out: frozenset[Place]
    ) -> None:
        self._cells, self._at, self._numbers, self._timeout = cells, 2 * worker, numbers, timeout
        self._left_out = left_out
        self._reading = 0

    def begin_shard(self, url: str) -> None:
        """Note that a shard is being read.

        Raises:
            ShardError: When that has killed workers before.
        """
        self._cells[self._at] = self._reading = self._numbers[url]
        if Place(url, None) in self._left_out:
            raise ShardError("reading it killed two worker processes")

    def checked(self, url: str, sample: Sample) -> Sample:
        """The sample; without its members and with the problem ``decoder_crash`` if it has killed workers before."""
        if sample.problem is None and self.is_left_out(url, sample.index):
            return replace(sample, members=(), problem=DropReason.DECODER_CRASH)
        return sample

    def is_left_out(self, url: str, index: int) -> bool:
        """Whether a sample has killed workers before."""
        return bool(self._left_out) and Place(url, index) in self._left_out

    def at(self, url: str, index: int) -> Self:
        """``with trail.at(url, index):`` around whatever a sample's bytes may do harm to."""
        self._cells[self._at] = self._numbers[url]
        self._cells[self._at + 1] = index + 1
        if self._timeout:
            signal.setitimer(signal.ITIMER_REAL, self._timeout)  # the kernel's: it also ends a decoder stuck in C
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._timeout:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._cells[self._at + 1] = 0
        self._cells[self._at] = self._reading  # of a shuffled stream, by now another one


# --- starting them ---


def worker_loader(
    dataset: Dataset[T],
    *,
    num_workers: int,
    pin_memory: bool = False,
    requests: Iterable[Any] | None = None,
    in_order: bool = True,
    persistent_workers: bool = False,
    multiprocessing_context: str | None = None,
    whereabouts: Whereabouts | None = None,
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
        whereabouts: What the dataset's workers write what they are at to. A worker's death is then a
            :class:`WorkerDiedError`.
    """
    is_watched = whereabouts is not None and num_workers > 0
    loader: DataLoader[T] = DataLoader(
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
        # When it is iterated again, persistent workers may take their time to answer.
        timeout=_POLL_SECONDS if is_watched and not persistent_workers else 0,
    )
    return _WatchedLoader(loader, whereabouts) if is_watched and whereabouts else loader


def _init_worker(worker: int) -> None:
    os.putenv("TOKENIZERS_PARALLELISM", "false")  # a worker is one core's worth of work
    # Ctrl-C goes to every process of a terminal; only the parent answers it, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever the parent does with it
    sys.excepthook = _tell_unless_parent_went


def _tell_unless_parent_went(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Keep quiet when the parent is stopped while a worker hands it a tensor, in a thread of multiprocessing's."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


# --- watching them ---


@dataclass(frozen=True)
class _WatchedLoader(Generic[T]):
    """A DataLoader that says what a worker was at when it died."""

    loader: DataLoader[T]
    whereabouts: Whereabouts

    def __iter__(self) -> "_WatchedIterator[T]":
        return _WatchedIterator(iter(self.loader), self.whereabouts)


class _WatchedIterator(Iterator[T]):
    def __init__(self, batches: Any, whereabouts: Whereabouts) -> None:
        self._batches, self._whereabouts = batches, whereabouts
        if batches._worker_pids_set:
            # torch would raise from a signal handler, in whatever line the main thread happens to be.
            _remove_worker_pids(id(batches))
            batches._worker_pids_set = False

    def __next__(self) -> T:
        while True:
            try:
                batch: T = next(self._batches)
            except (RuntimeError, OSError, EOFError) as error:
                if (death := self._death(0.0 if isinstance(error, RuntimeError) else 1.0)) is not None:
                    self._shutdown_workers()
                    raise death from error
                if not str(error).startswith("DataLoader timed out"):
                    raise
            else:
                return batch

    def _death(self, seconds: float) -> WorkerDiedError | None:
        """A death, also of a worker that is about to die: what it has sent can't be received from then on."""
        until = time.monotonic() + seconds
        while (death := self._find_death()) is None and time.monotonic() < until:
            time.sleep(0.01)
        return death

    def _find_death(self) -> WorkerDiedError | None:
        """Of a worker that died, not of one that has ended because it was done."""
        for worker, process in enumerate(self._batches._workers):
            place = self._whereabouts.place(worker)
            at_sample = place is not None and place.index is not None
            if not process.is_alive() and (process.exitcode != 0 or at_sample):
                return WorkerDiedError(place, process.exitcode)
        return None

    def _shutdown_workers(self) -> None:
        """End the workers; called as a DataLoader's iterator calls it, since others end either kind."""
        self._batches._shutdown_workers()
