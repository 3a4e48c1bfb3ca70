"""Starts workers again after one of them has died."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TypeVar

from clipfilter_wds.workers.crashes import CrashTracker, Quarantine, WorkerDiedError
from clipfilter_wds.workers.pool import iterating

T = TypeVar("T")


def restarting(
    start: Callable[[CrashTracker], Iterable[T]],
    urls: Sequence[str],
    *,
    num_workers: int,
    worker_timeout: float,
    quarantine: Quarantine | None = None,
) -> Generator[T]:
    """Yield what workers give, and start new ones when one dies. What kills a worker twice is left out.

    Args:
        start: Starts workers that report to this tracker, and gives what they make. Called again after a death, it
            continues behind what has been yielded.
        urls: All shards that the workers read.
        num_workers: Worker processes.
        worker_timeout: Seconds that one sample may take before its worker is killed; 0 is for ever.
        quarantine: What earlier workers died of; these add to it.

    Raises:
        WorkerDiedError: When workers die at once, or more in a row than the quarantine stands.
    """
    quarantine = Quarantine() if quarantine is None else quarantine
    while True:
        tracker = CrashTracker(urls, num_workers, timeout=worker_timeout, left_out=quarantine.left_out)
        try:
            with iterating(start(tracker)) as items:
                for item in items:
                    quarantine.note_batch()
                    yield item
            return
        except WorkerDiedError as death:
            quarantine.add(death)
