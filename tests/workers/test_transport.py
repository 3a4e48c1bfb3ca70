"""What workers make comes as it is, in memory that they share with their parent."""

import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils.data import IterableDataset, get_worker_info

from clipfilter_wds.workers.pool import iterating, worker_loader
from clipfilter_wds.workers.slots import SLOTS_PER_WORKER, Slots, SlotsClosedError
from clipfilter_wds.workers.transport import Lent, _Pickler, _Unpickler, lent, slot_buffer
from tests.support.pace import Stopwatch

METHODS = ["fork", *(pytest.param(method, marks=pytest.mark.slow) for method in ("spawn", "forkserver"))]

TYPES = [torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.complex64]


def sent(item, *, copy: bool, slots: Slots | None = None):
    """An item as its parent gets it, and the slots."""
    slots = slots or Slots(1)
    worker, file = slots.of_worker(0), io.BytesIO()
    _Pickler(file, worker).dump(item)
    slot = worker.send()
    memory = None if slot is None else slots.memory(slot)
    return _Unpickler(file.getvalue(), memory, copy=copy).load(), slots


@st.composite
def tensors(draw):
    dtype, shape = draw(st.sampled_from(TYPES)), draw(st.lists(st.integers(0, 40), max_size=3))
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))).to(dtype)
    if len(shape) > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    return tensor[::2] if shape and draw(st.booleans()) else tensor


@given(
    st.lists(st.dictionaries(st.text(), tensors() | st.text() | st.integers(), max_size=3), max_size=3), st.booleans()
)
def test_any_item_comes_as_it_is(item, copy):
    found, _ = sent(item, copy=copy)
    assert len(found) == len(item)
    for of_found, of_item in zip(found, item, strict=True):
        assert of_found.keys() == of_item.keys()
        for name, value in of_item.items():
            if isinstance(value, torch.Tensor):
                assert of_found[name].dtype is value.dtype
                assert torch.equal(of_found[name], value)
            else:
                assert of_found[name] == value


@pytest.mark.parametrize("copy", [False, True])
def test_a_tensor_with_a_history_or_of_another_layout_comes_as_pickle_sends_it(copy):
    sparse, parameter = torch.eye(40).to_sparse(), torch.nn.Parameter(torch.rand(40, 40))
    (found, trained), _ = sent((sparse, parameter), copy=copy)
    assert torch.equal(found.to_dense(), torch.eye(40))
    assert isinstance(trained, torch.nn.Parameter)
    assert torch.equal(trained, parameter)


def test_a_slot_grows_while_it_is_filled_and_what_is_in_it_stays():
    slots = Slots(1)
    worker = slots.of_worker(0)
    views = worker.buffer(1 << 16).fill_(3)[:1000].view(10, 100)
    other = torch.rand(1000, 1000)
    slots.of_worker(0)
    places = [worker.place(views), worker.place(other), worker.place(views)]
    assert places[0] == places[2] == (0, (100, 1))
    memory = slots.memory(worker.send())
    assert torch.equal(memory[:1000], torch.full((1000,), 3, dtype=torch.uint8))
    begin, strides = places[1]
    there = torch.empty(0).set_(memory.untyped_storage(), begin // 4, other.shape, strides)
    assert torch.equal(there, other)


def test_a_worker_has_no_more_slots_than_it_has_and_waits_for_one_until_it_is_told_to_end():
    slots = Slots(2)
    worker = slots.of_worker(1)
    taken = []
    for _ in range(SLOTS_PER_WORKER):
        worker.buffer(10)
        taken.append(worker.send())
    assert taken == [2, 3]
    slots.release(3)
    worker.buffer(10)
    assert worker.send() == 3
    slots.close()
    with pytest.raises(SlotsClosedError):
        worker.buffer(10)


def test_slots_are_handed_to_processes_that_start_only():
    with pytest.raises(TypeError, match="processes that are being started only"):
        pickle.dumps(Slots(1))


class Batches(IterableDataset):
    """Batches whose tensors all hold their number; of the size that a worker that is asked for more would not have."""

    def __init__(self, num_batches: int = 12, num_bytes: int = 1 << 16) -> None:
        self.num_batches, self.num_bytes = num_batches, num_bytes

    def __iter__(self):
        for number in range(self.num_batches):
            views = slot_buffer(self.num_bytes).fill_(number)
            yield {"number": number, "views": views[: self.num_bytes // 2], "more": torch.full((3000,), float(number))}


def check(batch) -> int:
    number = batch["number"]
    assert bool((batch["views"] == number).all())
    assert bool((batch["more"] == number).all())
    return number


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lend", [False, True])
def test_every_batch_comes_once_however_processes_are_started_and_also_from_persistent_workers(method, lend):
    batches = worker_loader(
        Batches(), num_workers=2, lend=lend, persistent_workers=True, multiprocessing_context=method
    )
    for taken in (None, 3, None):  # of an iteration that is broken off, batches are under way
        numbers = []
        for batch in map(lent, batches):
            numbers.append(check(batch.item))
            batch.release()
            if len(numbers) == taken:
                break
        if taken is None:
            assert sorted(numbers) == sorted(2 * list(range(12)))
    batches._iterator.close()


def test_without_workers_batches_are_ordinary():
    with iterating(worker_loader(Batches(), num_workers=0, lend=True)) as batches:
        assert [check(batch) for batch in batches] == list(range(12))


def test_what_is_copied_stays_and_what_is_lent_is_gone_with_its_release():
    with iterating(worker_loader(Batches(), num_workers=1)) as batches:
        kept = list(batches)
    assert [check(batch) for batch in kept] == list(range(12))
    with iterating(worker_loader(Batches(), num_workers=1, lend=True)) as batches:
        first = next(batches)
        assert isinstance(first, Lent)
        assert first.is_shared
        views = first.item["views"]
        first.release()
        assert not first.is_shared
        for batch in batches:
            batch.release()
    assert not bool((views == 0).all())  # the worker has filled it again


def test_a_lent_batch_that_nobody_looks_at_is_given_back():
    with iterating(worker_loader(Batches(), num_workers=1, lend=True)) as batches:
        for _ in batches:
            pass


class Unpicklable(IterableDataset):
    def __iter__(self):
        yield torch.zeros(5)
        yield lambda: None


def test_what_can_not_be_pickled_is_an_error_and_not_lost():
    with iterating(worker_loader(Unpicklable(), num_workers=1)) as batches:
        assert len(next(batches)) == 5
        with pytest.raises(Exception, match=r"[Cc]an't (get local|pickle)"):
            next(batches)


class Stopped(IterableDataset):
    """Stops its process while it fills a slot, until it is told to continue."""

    def __iter__(self):
        for batch in Batches(6):
            if batch["number"] == 3:
                Path(self.told, str(os.getpid())).touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            yield batch

    def __init__(self, told: Path) -> None:
        self.told = told


def test_a_worker_that_is_stopped_while_it_fills_a_slot_continues(tmp_path):
    code = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "while not (pids := list(Path(sys.argv[1]).iterdir())): time.sleep(0.05)\n"
        "time.sleep(1); os.kill(int(pids[0].name), signal.SIGCONT)"
    )
    batches = worker_loader(Stopped(tmp_path), num_workers=1)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]), iterating(batches) as read:
        assert [check(batch) for batch in read] == list(range(6))


class Slow(IterableDataset):
    def __iter__(self):
        assert get_worker_info() is not None
        while True:
            yield {"number": 1, "views": slot_buffer(1 << 16).fill_(1)}


def test_workers_that_wait_for_a_slot_end_at_once():
    with iterating(worker_loader(Slow(), num_workers=2, lend=True)) as batches:
        held = [next(batches) for _ in range(2 * SLOTS_PER_WORKER)]
        assert len(held) == 4
        with Stopwatch() as watch:
            batches.close()
            assert watch.seconds() < 3


def test_batches_that_do_not_fit_in_memory_are_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"2 workers prepare 4 batches at a time.* GiB are free, .* GiB less"):
        worker_loader(Batches(), num_workers=2, batch_bytes=1 << 50)
