"""Workers that end anywhere keep nobody waiting, and share what they share."""

import gc
import inspect
import multiprocessing.connection
import multiprocessing.synchronize
import re
import resource
import struct
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils.worker import _worker_loop
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from clipfilter_wds.workers import pool
from clipfilter_wds.workers.crashes import CrashTracker, LostBatchError, WorkerDiedError
from clipfilter_wds.workers.pool import iterating, worker_loader
from tests.support.evil import out_of_memory
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


class Loser(IterableDataset):
    """Yields without end; the second message of worker 0 gets lost."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items

    def __iter__(self):
        send = multiprocessing.connection.Connection._send_bytes
        for number in range(self.num_items):
            is_lost = get_worker_info().id == 0 and number == 1
            multiprocessing.connection.Connection._send_bytes = (lambda *_: None) if is_lost else send
            yield number
            wait_until_sent(sys._getframe())
        multiprocessing.connection.Connection._send_bytes = send


def wait_until_sent(frame) -> None:
    while frame.f_code is not _worker_loop.__code__:
        frame = frame.f_back
    queue = frame.f_locals["data_queue"]
    while queue._buffer:
        time.sleep(0.01)
    time.sleep(0.1)


@pytest.mark.parametrize("num_items", [2, 3, 50])
def test_a_message_that_gets_lost_is_an_error(monkeypatch, num_items):
    monkeypatch.setattr(pool, "_LOST_SECONDS", 2.0)
    with (
        pytest.raises(LostBatchError, match="worker process 0 was lost"),
        iterating(worker_loader(Loser(num_items), num_workers=2)) as numbers,
    ):
        deque(numbers, maxlen=0)


def start_with_few_files(persistent: bool) -> list[tuple[str, int, str]]:
    """Per number of files that may still be opened, what came of starting, how many were left, what Python ignored."""
    hard, outcomes = resource.getrlimit(resource.RLIMIT_NOFILE)[1], []
    ignored: list[object] = []
    sys.unraisablehook = ignored.append
    for num_free in range(4, 40, 3):
        num_open = len(list(Path("/proc/self/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + num_free, hard))
        said = ""
        try:
            loader = worker_loader(Loser(2), num_workers=4, persistent_workers=persistent)
            iter(loader)
        except OSError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        num_left = len(multiprocessing.active_children()) if said else 0
        outcomes.append((said, num_left, " ".join(map(str, ignored))))
    return outcomes


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_can_not_all_be_started_are_not_left(persistent):
    outcomes = in_fresh_process(start_with_few_files, persistent)
    failed = [outcome for outcome in outcomes if outcome[0]]
    assert len(failed) > 3
    assert all("no more processes can be started (Too many open files); fewer num" in said for said, _, _ in failed)
    assert [outcome[1:] for outcome in failed] == [(0, "")] * len(failed)


def test_what_is_overridden_of_torch_is_there():
    """Names that are torch's own, and may change with any version of it."""
    names = set(dir(DataLoader)) | set(dir(_MultiProcessingDataLoaderIter))
    needed = {"_get_iterator", "_reset", "_get_data", "_try_get_data", "_shutdown_workers"}
    assert needed <= names, f"torch {torch.__version__} has no {needed - names}; see clipfilter_wds/workers/pool.py"
    assert list(inspect.signature(_MultiProcessingDataLoaderIter._reset).parameters) == ["self", "loader", "first_iter"]
    assert "_iterator" in vars(DataLoader([1])), f"torch {torch.__version__} keeps persistent workers elsewhere"
    source = inspect.getsource(_MultiProcessingDataLoaderIter)
    for name in (
        "self._workers",
        "self._worker_result_queue",
        "self._worker_pids_set",
        "self._shutdown",
        "self._workers_status",
    ):
        assert f"{name} = " in source or f"{name}: " in source, f"torch {torch.__version__} sets no {name}"


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
