"""What worker processes are at, left where it outlives them; and what follows when one dies of it."""

import logging
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import RawArray
from typing import Any, Self

from torch.utils.data import get_worker_info

from clipfilter_wds.shards.names import public_url
from clipfilter_wds.types import DropReason, Sample, ShardError

_log = logging.getLogger(__name__)

#: Quarantine with no batch in between after which it is not a sample's fault.
_MAX_DEATHS_IN_A_ROW = 32


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample, or with no index the reading of its shard."""

    url: str
    index: int | None

    def __str__(self) -> str:
        url = repr(public_url(self.url))  # quoted, since a name may hold escape codes
        return f"reading {url}" if self.index is None else f"sample {self.index} of {url}"


class WorkerDiedError(RuntimeError):
    """A worker process died; the message says of what, and at which sample."""

    def __init__(self, sample: SampleRef | None, exit_code: int | None) -> None:
        super().__init__(sample, exit_code)  # as they are, so that it can be pickled
        self.sample, self.exit_code = sample, exit_code

    def __str__(self) -> str:
        return f"a worker process died ({_cause(self.exit_code)}) at {self.sample or 'its start'}"


def _cause(exit_code: int | None) -> str:
    if exit_code == -signal.SIGALRM:
        return "it took longer than worker_timeout"
    if exit_code == -signal.SIGKILL:
        return "SIGKILL, as the system sends when memory runs out"
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    return signal.Signals(-exit_code).name


class Quarantine:
    """What workers died of. What kills one twice is left out from then on: a sample, or a whole shard."""

    def __init__(self) -> None:
        self._counts: Counter[SampleRef] = Counter()
        self._in_a_row = 0
        self.left_out: set[SampleRef] = set()

    def add(self, death: WorkerDiedError) -> None:
        """Count a death after which reading goes on.

        Raises:
            WorkerDiedError: When that is of no use, because workers die at once or everywhere.
        """
        self._in_a_row += 1
        if death.sample is None or self._in_a_row > _MAX_DEATHS_IN_A_ROW:
            raise death
        self._counts[death.sample] += 1
        if self._counts[death.sample] > 1:
            self.left_out.add(death.sample)
        _log.warning("%s; %s", death, "that is left out" if death.sample in self.left_out else "trying once more")

    def outlived(self) -> None:
        """Note that a batch has come."""
        self._in_a_row = 0


class CrashTracker:
    """What each worker is at, in memory that outlives the worker.

    Args:
        urls: All shards that the workers read.
        num_workers: Processes that are watched; with 0, each keeps to itself what it is at.
        timeout: Seconds that one sample may take in a worker before its process is killed; 0 is for ever.
        left_out: What has killed workers before.
    """

    def __init__(
        self, urls: Sequence[str], num_workers: int, *, timeout: float = 0.0, left_out: Iterable[SampleRef] = ()
    ) -> None:
        self._urls = list(urls)
        self._timeout = timeout
        self._left_out = frozenset(left_out)
        # Per worker the shard, counting from 1, and the sample, likewise; 0 where there is none.
        self._cells = RawArray("q", 2 * num_workers) if num_workers else [0, 0]
        self._num_workers = num_workers

    def last_seen(self, worker: int) -> SampleRef | None:
        """Where a worker is, or was when it died."""
        shard, sample = self._cells[2 * worker : 2 * worker + 2]
        return SampleRef(self._urls[shard - 1], sample - 1 if sample else None) if shard else None

    def for_worker(self) -> "WorkerTracker":
        """For the process that calls it: where to leave what it is at."""
        info = get_worker_info()
        worker, timeout = (info.id, self._timeout) if info and self._num_workers else (0, 0.0)
        numbers = {url: number for number, url in enumerate(self._urls, start=1)}
        return WorkerTracker(self._cells, worker, numbers, timeout, self._left_out)


class WorkerTracker:
    """Where one worker leaves what it is at."""

    def __init__(
        self, cells: Any, worker: int, numbers: dict[str, int], timeout: float, left_out: frozenset[SampleRef]
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
        if SampleRef(url, None) in self._left_out:
            raise ShardError("reading it killed two worker processes")

    def checked(self, url: str, sample: Sample) -> Sample:
        """The sample; without its members and with the problem ``decoder_crash`` if it has killed workers before."""
        if sample.problem is None and self.is_left_out(url, sample.index):
            return replace(sample, members=(), problem=DropReason.DECODER_CRASH)
        return sample

    def is_left_out(self, url: str, index: int) -> bool:
        """Whether a sample has killed workers before."""
        return bool(self._left_out) and SampleRef(url, index) in self._left_out

    def at(self, url: str, index: int) -> Self:
        """``with worker_tracker.at(url, index):`` around whatever a sample's bytes may do harm to."""
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
