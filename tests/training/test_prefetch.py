import threading
from functools import partial

import pytest

from clipfilter_wds.training.prefetch import Prefetcher
from tests.support.pace import FOREVER


def feed_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("clipfilter-")]


def each(function):
    """Make of a function of one item what a feed applies to all."""
    return partial(map, function)


def failing_after(num_items):
    yield from range(num_items)
    raise OSError("the disk is gone")


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("num_items", [0, 1, 7])
def test_every_item_comes_once_in_order(num_items, depth):
    feed = Prefetcher(range(num_items), each(lambda item: item * item), depth=depth)
    assert list(feed) == [item * item for item in range(num_items)]
    feed.close()
    assert feed_threads() == []


def test_items_are_made_in_another_thread_whose_name_tells_whose_it_is():
    feed = Prefetcher(range(3), each(lambda item: threading.current_thread().name))
    assert all(name.startswith("clipfilter-") for name in feed)
    feed.close()


def test_works_ahead_by_its_depth_and_no_further():
    made, reached = [], threading.Event()

    def apply(item):
        made.append(item)
        if item == 3:
            reached.set()
        return item

    feed = Prefetcher(range(100), each(apply), depth=3)
    items = iter(feed)
    assert next(items) == 0
    assert reached.wait(FOREVER)  # three ahead of the one taken
    feed.close()
    assert made == [0, 1, 2, 3]


def test_what_the_items_raise_comes_where_the_item_would_have_come():
    feed = Prefetcher(failing_after(3), each(str))
    items = iter(feed)
    assert [next(items) for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    feed.close()
    assert feed_threads() == []


def test_what_the_function_raises_comes_where_the_item_would_have_come():
    feed = Prefetcher([1, 0], each(lambda item: 1 / item))
    items = iter(feed)
    assert next(items) == 1.0
    with pytest.raises(ZeroDivisionError):
        next(items)
    feed.close()
    assert feed_threads() == []


def test_closing_lets_go_of_the_items():
    closed = threading.Event()

    def items():
        try:
            yield from range(1000)
        finally:
            closed.set()

    feed = Prefetcher(items(), each(str))
    taken = iter(feed)
    next(taken)
    feed.close()
    assert closed.is_set()
    assert feed_threads() == []


def test_closing_before_anything_was_taken_is_no_error():
    feed = Prefetcher(range(5), each(str))
    feed.close()
    assert feed_threads() == []
