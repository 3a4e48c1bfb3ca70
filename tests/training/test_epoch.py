import logging
import os
import signal
import threading
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path

import psutil
import pytest

from clipfilter_wds.training.keep_rate import StarvationError
from tests.support.processes import in_fresh_process
from tests.support.restore import expected_keys, flat, image_number, keys

# --- epochs ---


@pytest.mark.parametrize(
    ("context", "num_workers", "shuffle"),
    [
        (None, 0, 0),
        (None, 0, 10),
        ("fork", 1, 10),
        ("fork", 3, 0),
        ("fork", 6, 10),
        pytest.param("spawn", 1, 10, marks=pytest.mark.slow),
        pytest.param("spawn", 3, 10, marks=pytest.mark.slow),
        ("forkserver", 2, 10),
        pytest.param("forkserver", 3, 10, marks=pytest.mark.slow),
    ],
)
def test_several_epochs_give_every_sample_once_an_epoch(half, scores, context, num_workers, shuffle):
    quick = context in (None, "fork")
    loader = half.but_dataset(shuffle=shuffle).build(num_workers=num_workers, multiprocessing_context=context)
    epochs = keys(loader, 3 if quick else 2)
    for epoch in epochs:
        assert sorted(flat([epoch])) == expected_keys(half, scores)
    assert (epochs[0] != epochs[1]) == bool(shuffle)
    assert loader.stats.seen == 48 * len(epochs)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_epochs_follow_one_another_and_set_epoch_gives_each_again(half, num_workers):
    recipe = half.but(num_workers=num_workers).but_dataset(shuffle=10)
    epochs = keys(recipe.build(), 3)
    loader = recipe.build()
    for epoch in (2, 0, 1):
        loader.set_epoch(epoch)
        assert keys(loader) == [epochs[epoch]]


def test_after_a_break_comes_the_next_epoch(half):
    recipe = half.but_dataset(shuffle=10)
    epochs = keys(recipe.build(), 2)
    loader = recipe.build()
    for _ in loader:
        break
    assert keys(loader) == [epochs[1]]


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (None, TypeError)])
def test_an_epoch_that_is_no_number_of_one_is_refused(half, epoch, error):
    with pytest.raises(error, match=f"epoch is {epoch!r}; it must be"):
        half.build().set_epoch(epoch)


def test_set_epoch_after_a_break_is_the_beginning_that_the_state_says(half):
    recipe = half.but_dataset(shuffle=10)
    epochs = keys(recipe.build(), 2)
    loader = recipe.build()
    iterator = iter(loader)  # kept, as Lightning keeps it
    assert len(list(islice(iterator, 2))) == 2
    loader.set_epoch(1)
    loader.load_state_dict(loader.state_dict())
    assert keys(loader) == [epochs[1]]


@pytest.mark.parametrize("shuffle", [0, 10])
def test_persistent_workers_stay_and_give_the_same_epochs(half, shuffle):
    usual = half.but_dataset(shuffle=shuffle).but(num_workers=2).build()
    staying = half.but_dataset(shuffle=shuffle).but(num_workers=2, persistent_workers=True).build()
    workers = []
    for taken in (None, 2, None, 0, None):  # whole epochs, and some that are broken off
        epochs = []
        for loader in (usual, staying):
            epochs.append([batch["__key__"] for batch in islice(loader, taken)])
        assert epochs[0] == epochs[1]
        workers.append({child.pid for child in psutil.Process().children() if child.name() == "pt_data_worker"})
    assert workers[0] == workers[-1] != set()


def test_another_seed_is_another_order(half):
    orders = [keys(half.but_dataset(shuffle=10, seed=seed).build()) for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [5, 8, 1000])
def test_stats_count_every_sample_of_every_epoch(half, batch_size, drop_last):
    loader = half.but_dataset(shuffle=10).build(batch_size=batch_size, drop_last=drop_last)
    for epoch in range(1, 4):
        keys(loader)
        assert (loader.stats.seen, loader.stats.kept) == (48 * epoch, 24 * epoch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_repeat_never_ends_and_gives_batches_of_one_size(half, scores, num_workers):
    loader = half.but_dataset(shuffle=10).build(num_workers=num_workers, end="repeat", batches_per_epoch=7)
    assert len(loader) == 7
    epochs = keys(loader, 5)
    assert [len(epoch) for epoch in epochs] == [7] * 5
    assert {len(batch) for epoch in epochs for batch in epoch} == {5}
    stream = flat(epochs)
    # 175 of an endless stream that gives each of the 24 kept samples once in every 24.
    if num_workers == 0:
        for first in range(0, 168, 24):
            assert sorted(stream[first : first + 24]) == expected_keys(half, scores)
    assert {stream.count(key) for key in expected_keys(half, scores)} <= {6, 7, 8, 9}


def test_how_long_an_epoch_is_is_not_known_beforehand(half):
    with pytest.raises(TypeError, match="not known beforehand"):
        len(half.build())


def test_an_epoch_of_which_drop_last_leaves_nothing_is_warned_of(half, caplog):
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        assert len(keys(half.build(batch_size=24, drop_last=True))[0]) == 1
        assert not caplog.records
        assert keys(half.build(batch_size=25, drop_last=True)) == [[]]
    said = (
        "the epoch gave no batch: batch_size is 25, no rank keeps as many pairs (by rank: [24]), and drop_last leaves"
    )
    assert said in caplog.text


def test_an_incomplete_last_batch_is_no_left_over_of_a_lone_rank(half, caplog):
    loader = half.build(drop_last=True)
    with caplog.at_level(logging.WARNING, logger="clipfilter_wds"):
        assert len(keys(loader)[0]) == 4
    assert loader.left_over == 0
    assert not caplog.records


# --- clean shutdown ---


class Watched:
    """What this process had before: its processes, and its shared memory."""

    def __init__(self):
        self.children = set(psutil.Process().children(recursive=True))
        self.pids = {os.getpid()}

    def see_workers(self, num_workers):
        """Remember the workers, which have to be there."""
        workers = set(psutil.Process().children(recursive=True)) - self.children
        assert len(workers) == num_workers
        self.pids |= {worker.pid for worker in workers}

    def left(self):
        """Processes, threads and shared memory that were left behind."""
        children = set(psutil.Process().children(recursive=True)) - self.children
        shared = [path.name for path in Path("/dev/shm").glob("torch_*") if int(path.name.split("_")[1]) in self.pids]
        threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("clipfilter-")]
        return [*(f"{child.name()} {child.status()}" for child in children), *threads, *shared]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_left_after_an_epoch_or_a_break(half, num_workers):
    watched, loader = Watched(), half.build(num_workers=num_workers)
    for _ in loader:
        watched.see_workers(num_workers)
        break
    assert watched.left() == []
    keys(loader)
    assert watched.left() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_left_after_an_exception_in_the_training_loop(half, num_workers):
    watched, loader = Watched(), half.build(num_workers=num_workers)
    with pytest.raises(ZeroDivisionError):  # noqa: PT012  # the loop is what is left by it
        for _ in loader:
            watched.see_workers(num_workers)
            raise ZeroDivisionError
    assert watched.left() == []


def fail_at(bad, image):
    number = image_number(image)
    if number == bad:
        raise LookupError(f"no label for {number}")
    return number


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_in_a_transform_surfaces_with_its_cause_and_leaves_nothing(half, num_workers):
    watched = Watched()
    loader = half.but_dataset(image_transform=partial(fail_at, 2005)).build(num_workers=num_workers)
    with pytest.raises(LookupError, match="no label for 2005") as raised:
        keys(loader)
    # The error is still held, as by a debugger or a log.
    assert watched.left() == []
    if num_workers:
        assert "in fail_at" in str(raised.value)


def test_nothing_is_left_when_the_error_of_a_worker_is_forgotten(half):
    watched = Watched()
    loader = half.but_dataset(image_transform=partial(fail_at, 2005)).build(num_workers=2)
    with suppress(LookupError):
        keys(loader)
    assert watched.left() == []


def test_nothing_is_left_after_starvation(half):
    watched, loader = Watched(), half.build(threshold=0.9, num_workers=2, starvation_limit=8)
    with pytest.raises(StarvationError):
        keys(loader)
    assert watched.left() == []


@pytest.mark.slow
def test_nothing_is_left_after_many_quick_starts(half):
    watched, loader = Watched(), half.build(num_workers=1)
    for _ in range(3):
        next(iter(loader))
    num_files = psutil.Process().num_fds()
    for _ in range(30):
        for _ in loader:
            break
    assert watched.left() == []
    assert psutil.Process().num_fds() <= num_files


def interrupt_at(bad, image):
    """Ctrl-C, while the training loop waits for this sample."""
    if image_number(image) == bad:
        os.killpg(0, signal.SIGINT)
    return image_number(image)


def interrupted(recipe, num_workers, while_waiting):
    """What is left after Ctrl-C in the loop or while it waits; runs in a process group of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watched, loader = Watched(), recipe.build(num_workers=num_workers)
    was_interrupted = False
    try:
        for number, _ in enumerate(loader):
            if number == 0:
                watched.see_workers(num_workers)
            if not while_waiting:
                os.killpg(0, signal.SIGINT)
    except KeyboardInterrupt:
        was_interrupted = True
    return was_interrupted, watched.left()


@pytest.mark.parametrize("while_waiting", [False, True])
def test_nothing_is_left_after_ctrl_c(half, while_waiting):
    if while_waiting:
        half = half.but_dataset(image_transform=partial(interrupt_at, 2005))
    assert in_fresh_process(interrupted, half, 2, while_waiting) == (True, [])
