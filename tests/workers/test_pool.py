"""Workers that end anywhere keep nobody waiting, and share what they share."""

import gc
import multiprocessing.connection
import multiprocessing.synchronize
import re
import struct
import sys
from collections import deque
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils.worker import _worker_loop

from clipfilter_wds.workers.crashes import CrashTracker, WorkerDiedError
from clipfilter_wds.workers.pool import iterating, worker_loader
from tests.support.evil import loop, out_of_memory
from tests.support.pace import FOREVER
from tests.support.processes import in_fresh_process

# --- what they send ---


class Numbers(IterableDataset):
    """Yields without end; worker 0 is killed, or what else the harm is, when it has sent half of its second."""

    def __init__(self, tracker: CrashTracker, harm=out_of_memory) -> None:
        self.tracker, self.harm = tracker, harm

    def __iter__(self):
        yield 1
        if get_worker_info().id == 0:
            self.tracker.for_worker().at("a.tar", 7)
            multiprocessing.connection.Connection._send_bytes = self.send_half
        while True:
            yield 2

    def send_half(self, message: bytes) -> None:
        writer = sys._getframe(1).f_locals["self"]
        writer._send(struct.pack("!i", len(message)) + bytes(message)[: len(message) // 2])
        self.harm()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
)
def test_a_worker_that_is_killed_while_it_sends_keeps_nobody_waiting(method, persistent):
    tracker = CrashTracker(["a.tar"], 2)
    batches = worker_loader(
        Numbers(tracker),
        num_workers=2,
        tracker=tracker,
        persistent_workers=persistent,
        multiprocessing_context=method,
    )
    with pytest.raises(WorkerDiedError, match=r"SIGKILL.* at sample 7 of "), iterating(batches) as numbers:
        deque(numbers, maxlen=0)


@pytest.mark.parametrize("persistent", [False, True])
def test_nor_does_it_where_a_thread_waits_that_puts_batches_in_page_locked_memory(persistent):
    in_fresh_process(_read_pinned, persistent)


def tell_and_loop(event: multiprocessing.synchronize.Event) -> None:
    event.set()
    loop()


def _read_pinned(persistent: bool) -> None:
    """Torch's thread that pins memory hands on what is no tensor; so it can run where no accelerator is."""
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda: None
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.set_device_index = lambda index: None
    tracker = CrashTracker(["a.tar"], 2)
    options = {"num_workers": 2, "tracker": tracker, "pin_memory": True, "persistent_workers": persistent}
    half_sent = multiprocessing.Event()
    with iterating(worker_loader(Numbers(tracker, partial(tell_and_loop, half_sent)), **options)):
        half_sent.wait()
    train, other = worker_loader(Numbers(tracker), **options), worker_loader(Collections(), num_workers=1)
    with iterating(train) as numbers, iterating(other) as more:
        next(more)  # of a process that could write to what the first one reads
        with pytest.raises(WorkerDiedError, match=r"SIGKILL.* at sample 7 of "):
            deque(numbers, maxlen=0)


class Holder(IterableDataset):
    """Yields without end; worker 0 is killed at its second, with every lock in its hands that others wait for too."""

    def __init__(self, tracker: CrashTracker) -> None:
        self.tracker = tracker

    def __iter__(self):
        yield 1
        if get_worker_info().id == 0:
            self.tracker.for_worker().at("a.tar", 7)
            take_all_locks()
            out_of_memory()
        while True:
            yield 2


def take_all_locks() -> None:
    """Of the queues and the event that torch gives a worker."""
    frame = sys._getframe()
    while frame.f_code is not _worker_loop.__code__:
        frame = frame.f_back
    for name in ("index_queue", "data_queue", "done_event"):
        for part in vars(frame.f_locals[name]).values():
            lock = part._lock if isinstance(part, multiprocessing.synchronize.Condition) else part
            if isinstance(lock, multiprocessing.synchronize.Lock):
                assert lock.acquire(timeout=FOREVER)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize(
    "method", [None, *(pytest.param(m, marks=pytest.mark.slow) for m in ("fork", "spawn", "forkserver"))]
)
def test_a_worker_that_is_killed_with_all_locks_in_its_hands_keeps_nobody_waiting(method, persistent):
    tracker = CrashTracker(["a.tar"], 2)
    batches = worker_loader(
        Holder(tracker),
        num_workers=2,
        tracker=tracker,
        persistent_workers=persistent,
        multiprocessing_context=method,
    )
    with pytest.raises(WorkerDiedError, match=r"SIGKILL.* at sample 7 of "), iterating(batches) as numbers:
        deque(numbers, maxlen=0)


# --- memory ---


class Collections(IterableDataset):
    """Yields the bytes that collecting garbage makes this process's own: as it was started, and with nothing frozen."""

    def __iter__(self):
        for _ in range(2):
            before = own_bytes()
            gc.collect()
            yield own_bytes() - before
            gc.unfreeze()


def own_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Private_Dirty: +(\d+) kB", rollup, re.MULTILINE)[1]) << 10


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells what memory is whose")
def test_a_garbage_collection_in_a_worker_copies_nothing_of_what_it_shares_with_its_parent():
    num_bytes, num_if_not_frozen = worker_loader(Collections(), num_workers=1)
    assert num_bytes < num_if_not_frozen / 10
