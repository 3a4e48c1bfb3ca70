import threading
from functools import partial

import pytest
import torch

from clipfilter_wds.training.prefetch import Prefetcher
from tests.support.pace import FOREVER


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("clipfilter-")]


def each(function):
    """Make of a function of one item what a Prefetcher applies to all."""
    return partial(map, function)


def failing_after(num_items):
    yield from range(num_items)
    raise OSError("the disk is gone")


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("num_items", [0, 1, 7])
def test_every_item_comes_once_in_order(num_items, depth):
    prefetcher = Prefetcher(range(num_items), each(lambda item: item * item), depth=depth)
    assert list(prefetcher) == [item * item for item in range(num_items)]
    prefetcher.close()
    assert prefetch_threads() == []


def test_items_are_made_in_another_thread_whose_name_tells_whose_it_is():
    prefetcher = Prefetcher(range(3), each(lambda item: threading.current_thread().name))
    assert all(name.startswith("clipfilter-") for name in prefetcher)
    prefetcher.close()


def test_the_thread_has_the_gpu_of_the_one_that_made_it(monkeypatch):
    current = threading.local()
    current.gpu = 3
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "gpu", 0))
    monkeypatch.setattr(torch.cuda, "set_device", partial(setattr, current, "gpu"))
    prefetcher = Prefetcher(range(2), each(lambda _: torch.cuda.current_device()))
    assert list(prefetcher) == [3, 3]
    prefetcher.close()


def test_works_ahead_by_its_depth_and_no_further():
    made, reached = [], threading.Event()

    def apply(item):
        made.append(item)
        if item == 3:
            reached.set()
        return item

    prefetcher = Prefetcher(range(100), each(apply), depth=3)
    items = iter(prefetcher)
    assert next(items) == 0
    assert reached.wait(FOREVER)  # three ahead of the one taken
    prefetcher.close()
    assert made == [0, 1, 2, 3]


def test_what_the_items_raise_comes_where_the_item_would_have_come():
    prefetcher = Prefetcher(failing_after(3), each(str))
    items = iter(prefetcher)
    assert [next(items) for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    prefetcher.close()
    assert prefetch_threads() == []


def test_what_the_function_raises_comes_where_the_item_would_have_come():
    prefetcher = Prefetcher([1, 0], each(lambda item: 1 / item))
    items = iter(prefetcher)
    assert next(items) == 1.0
    with pytest.raises(ZeroDivisionError):
        next(items)
    prefetcher.close()
    assert prefetch_threads() == []


def test_closing_lets_go_of_the_items():
    closed = threading.Event()

    def items():
        try:
            yield from range(1000)
        finally:
            closed.set()

    prefetcher = Prefetcher(items(), each(str))
    taken = iter(prefetcher)
    next(taken)
    prefetcher.close()
    assert closed.is_set()
    assert prefetch_threads() == []


def test_closing_before_anything_was_taken_is_no_error():
    prefetcher = Prefetcher(range(5), each(str))
    prefetcher.close()
    assert prefetch_threads() == []
