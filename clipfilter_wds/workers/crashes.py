"""Tracks which sample each worker is at, and decides what to leave out when one dies."""

import logging
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import RawArray
from typing import Any, Self

from clipfilter_wds.shards.names import public_url
from clipfilter_wds.types import DropReason, Sample, ShardError
from clipfilter_wds.workers.stderr import QuietStderr, quiet_stderr

_log = logging.getLogger(__name__)

#: Deaths with no batch in between after which no sample can be at fault.
_MAX_DEATHS_IN_A_ROW = 32

#: What is said where a worker ended with an error before it had begun, most likely because it imported the script.
_AT_START = (
    "; its own error is above. Where processes are spawned (by default from Python 3.14), workers import the script "
    'that starts them: put what it does under `if __name__ == "__main__":`, and what a notebook defines in a module'
)


#: What is said where the time of a sample that nobody decodes any more runs out again.
_TOO_SHORT = "; nothing of it was decoded, so worker_timeout is too short for any sample: give more seconds, or 0"


@dataclass(frozen=True, slots=True)
class SampleRef:
    """A sample, or its shard where there is no index."""

    url: str
    index: int | None

    def __str__(self) -> str:
        url = repr(public_url(self.url))  # quoted, since a name may hold escape codes
        return f"reading {url}" if self.index is None else f"sample {self.index} of {url}"


class WorkerError(RuntimeError):
    """A worker process does not do what it was started for."""


class LostBatchError(WorkerError):
    """A worker has made a batch that does not come, however long it is waited for."""

    def __init__(self, worker: int) -> None:
        super().__init__(worker)  # unpickling calls the class with this
        self.worker = worker

    def __str__(self) -> str:
        return f"a batch of worker process {self.worker} was lost on its way"


class WorkerDiedError(WorkerError):
    """A worker process died; the message says of what, and at which sample, and ends with ``hint``."""

    def __init__(self, sample: SampleRef | None, exit_code: int | None, hint: str = "") -> None:
        super().__init__(sample, exit_code, hint)  # unpickling calls the class with these
        self.sample, self.exit_code = sample, exit_code
        self._hint = _AT_START if sample is None and exit_code == 1 else hint

    @property
    def cause(self) -> str:
        """What its exit code says."""
        return _cause(self.exit_code)

    def __str__(self) -> str:
        return f"a worker process died ({self.cause}) at {self.sample or 'its start'}{self._hint}"


def _cause(exit_code: int | None) -> str:
    if exit_code == -signal.SIGALRM:
        return "it took longer than worker_timeout"
    if exit_code == -signal.SIGKILL:
        return "SIGKILL, as the system sends when memory runs out"
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    return signal.Signals(-exit_code).name


class Quarantine:
    """Collects what workers died of. What kills two of them is left out from then on: a sample, or a whole shard.

    Args:
        max_in_a_row: Deaths with no batch in between that are put up with; 0 makes the first one an error.
    """

    def __init__(self, max_in_a_row: int = _MAX_DEATHS_IN_A_ROW) -> None:
        self._max_in_a_row, self._in_a_row = max_in_a_row, 0
        self._counts: Counter[SampleRef] = Counter()
        self.left_out: set[SampleRef] = set()

    def add(self, death: WorkerDiedError) -> None:
        """Count a death.

        Raises:
            WorkerDiedError: When starting workers again is of no use, because they die at once or one after another.
        """
        self._in_a_row += 1
        if death.sample is None or self._in_a_row > self._max_in_a_row:
            raise death
        if death.exit_code == -signal.SIGALRM and death.sample in self.left_out:
            raise WorkerDiedError(death.sample, death.exit_code, _TOO_SHORT)
        self._counts[death.sample] += 1
        if self._counts[death.sample] > 1:
            self.left_out.add(death.sample)
        _log.warning("%s; %s", death, "that is left out" if death.sample in self.left_out else "trying once more")

    def note_batch(self) -> None:
        """Note that a batch has come, so that the next death is the first in a row."""
        self._in_a_row = 0


class CrashTracker:
    """Knows which sample each worker is at, from memory that outlives the worker.

    Args:
        urls: All shards that the workers read.
        num_workers: Processes that are tracked; with 0, each process tracks itself alone.
        timeout: Seconds that one sample may take in a worker before its process is killed; 0 is for ever.
        left_out: What has killed workers before.
    """

    def __init__(
        self, urls: Sequence[str], num_workers: int, *, timeout: float = 0.0, left_out: Iterable[SampleRef] = ()
    ) -> None:
        self._urls = list(urls)
        self._timeout = timeout
        self._left_out = frozenset(left_out)
        # For each worker two numbers: its shard and its sample, counting from 1; 0 for none.
        self._cells = RawArray("q", 2 * num_workers) if num_workers else [0, 0]
        self._num_workers = num_workers

    def last_seen(self, worker: int) -> SampleRef | None:
        """What a worker is at, or was at when it died."""
        shard, sample = self._cells[2 * worker : 2 * worker + 2]
        return SampleRef(self._urls[shard - 1], sample - 1 if sample else None) if shard else None

    def for_worker(self) -> "WorkerTracker":
        """The tracker of the process that calls it."""
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        numbers = {url: number for number, url in enumerate(self._urls, start=1)}
        if info is None or not self._num_workers:
            return WorkerTracker(self._cells, 0, numbers, 0.0, self._left_out)
        return WorkerTracker(self._cells, info.id, numbers, self._timeout, self._left_out, quiet_stderr())


class WorkerTracker:
    """Notes which sample one worker is at, and keeps what C libraries write of it off the terminal."""

    def __init__(
        self,
        cells: Any,
        worker: int,
        numbers: dict[str, int],
        timeout: float,
        left_out: frozenset[SampleRef],
        quiet: QuietStderr | None = None,
    ) -> None:
        self._cells, self._at, self._numbers, self._timeout = cells, 2 * worker, numbers, timeout
        self._left_out, self._quiet = left_out, quiet
        self._reading = 0

    def begin_shard(self, url: str) -> None:
        """Note that a shard is being read.

        Raises:
            ShardError: When that has killed workers before.
        """
        self._cells[self._at] = self._reading = self._numbers[url]
        if SampleRef(url, None) in self._left_out:
            raise ShardError("reading it killed two worker processes")

    def continue_shard(self, url: str) -> None:
        """Note that a shard is being read again, after another."""
        self._cells[self._at] = self._reading = self._numbers[url]

    def checked(self, url: str, sample: Sample) -> Sample:
        """The sample; or, if it has killed workers before, one without members, whose problem is ``decoder_crash``."""
        if sample.problem is None and self.is_left_out(url, sample.index):
            return replace(sample, members=(), problem=DropReason.DECODER_CRASH)
        return sample

    def is_left_out(self, url: str, index: int) -> bool:
        """Whether a sample has killed workers before."""
        return bool(self._left_out) and SampleRef(url, index) in self._left_out

    def at(self, url: str, index: int) -> Self:
        """Use as ``with worker_tracker.at(url, index):`` around whatever a sample's bytes could crash."""
        self._cells[self._at] = self._numbers[url]
        self._cells[self._at + 1] = index + 1
        if self._timeout:
            signal.setitimer(signal.ITIMER_REAL, self._timeout)  # by the kernel, so a decoder stuck in C ends too
        return self

    def __enter__(self) -> None:
        if self._quiet is not None:
            self._quiet.begin()

    def __exit__(self, *_: object) -> None:
        if self._quiet is not None:
            self._quiet.end()
        if self._timeout:
            signal.setitimer(signal.ITIMER_REAL, 0)
        self._cells[self._at + 1] = 0
        self._cells[self._at] = self._reading  # a shuffled stream may have got to another shard by now
