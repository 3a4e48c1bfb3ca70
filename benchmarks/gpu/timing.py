"""Times work on a device, and the middle of a run."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

#: Share of the samples after which a run is under way, and before which it has not begun to end. By then, what workers
#: had decoded ahead while graphs were captured (two batches each, at most) is scored.
_BEGUN, _ENDING = 0.35, 0.9
#: Places of a round that are looked at.
_PLACES = 64


def synchronize(device: torch.device) -> None:
    """Wait for all that the device has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device, *, least: float, most: int = 100) -> float:
    """Per call, the device being kept busy: as many calls as take ``least`` seconds, but no more than ``most``."""
    once = _timed(work, device, 1)  # in which libraries choose kernels
    once = min(once, _timed(work, device, 1))
    count = max(2, min(most, int(least / max(once, 1e-6))))
    return _timed(work, device, count) / count


def _timed(work: Callable[[], Any], device: torch.device, count: int) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        work()
    synchronize(device)
    return time.perf_counter() - started


def host_seconds_of(work: Callable[[], Any], device: torch.device, count: int = 5) -> float:
    """Until a call returns, nothing being queued on the device."""
    times = []
    for _ in range(count):
        synchronize(device)
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    synchronize(device)
    return median(times)


class Timeline:
    """Notes how many samples were done when."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._counts: list[int] = []

    def note(self, count: int) -> None:
        """So many are done by now."""
        self._times.append(time.perf_counter())
        self._counts.append(count)

    def rate_of_turns(self, num_workers: int) -> float:
        """Samples per second of a DataLoader that takes its workers' batches in turn, their first ones left out.

        Counted from a worker's batch to a later one of the same: workers that take seconds for a batch have theirs
        ready all at once, and then none for a while.
        """
        last = len(self._times) - 1
        turns = max(1, (last - num_workers + 1) // num_workers)
        first = max(0, last - turns * num_workers)
        return (self._counts[last] - self._counts[first]) / max(self._times[last] - self._times[first], 1e-9)

    def rate_of_rounds(self, round_size: int) -> float:
        """Samples per second in the middle of a run: start and end, when workers fill and drain, don't count.

        Workers that begin together are done with a batch together, time after time. So it is measured how long a number
        of whole rounds takes, from each place of one on.

        Args:
            round_size: Samples of a batch of each worker.
        """
        times, counts = np.array(self._times), np.array(self._counts)
        begin, end = _BEGUN * counts[-1], _ENDING * counts[-1]
        rounds = int((end - begin) / round_size) - 1
        if rounds < 1:  # too short a run to have a middle
            return float((counts[-1] - counts[0]) / max(times[-1] - times[0], 1e-9))
        places = begin + round_size * np.linspace(0, 1, _PLACES, endpoint=False)
        later = places + rounds * round_size
        seconds = np.interp(later, counts, times) - np.interp(places, counts, times)
        return float(rounds * round_size / max(seconds.mean(), 1e-9))
