import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.stream import PartEnd, Position, ShardFailure, StreamOrder, StreamSample, read_stream
from clipfilter_wds.workers.crashes import CrashTracker
from tests.support.toys import write_shard, write_tar

SIZES = [5, 0, 8, 3, 1, 7]


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    """Shards of unequal sizes, in which a caption is the sample's only content."""
    folder = tmp_path_factory.mktemp("stream")
    shards = enumerate(SIZES)
    return [
        str(write_shard(folder / f"{shard}.tar", [{"jpg": b"i", "txt": b"c"}] * size, start=100 * shard))
        for shard, size in shards
    ]


def order(urls, *, shuffle=4, seed=0, num_streams=1, num_groups=1):
    return StreamOrder(urls=urls, shuffle=shuffle, seed=seed, num_streams=num_streams, num_groups=num_groups)


def epoch_of(stream_order, *, epoch=0, stream=0, start=None):
    """One epoch, but for the ends of shards."""
    worker_tracker = CrashTracker(stream_order.urls, 0).for_worker()
    items = read_stream(stream_order, stream, start or Position(epoch=epoch), SampleLayout(), worker_tracker)
    return [item for item in items if not isinstance(item, PartEnd)]


def keys(items):
    return [item.sample.key for item in items]


def all_keys():
    return sorted(f"{100 * shard + number:09d}" for shard, size in enumerate(SIZES) for number in range(size))


@settings(max_examples=60)
@given(
    num_streams=st.integers(1, 16),
    shuffle=st.sampled_from([0, 1, 3, 100]),
    epoch=st.integers(0, 3),
    num_shards=st.integers(1, 6),
    num_groups=st.integers(1, 4),
)
def test_the_streams_hold_every_sample_once_an_epoch(urls, num_streams, shuffle, epoch, num_shards, num_groups):
    read = [
        key
        for stream in range(num_streams)
        for key in keys(
            epoch_of(
                order(urls[:num_shards], shuffle=shuffle, num_streams=num_streams, num_groups=num_groups),
                epoch=epoch,
                stream=stream,
            )
        )
    ]
    assert sorted(read) == [key for key in all_keys() if int(key) // 100 < num_shards]


@pytest.mark.parametrize("shuffle", [0, 1, 4, 100])
@pytest.mark.parametrize("num_streams", [1, 4])
def test_resumes_after_every_sample_as_if_it_had_not_stopped(urls, shuffle, num_streams):
    for stream in range(num_streams):
        stream_order = order(urls, shuffle=shuffle, num_streams=num_streams)
        whole = epoch_of(stream_order, epoch=1, stream=stream)
        for number, item in enumerate(whole):
            assert epoch_of(stream_order, stream=stream, start=item.after) == whole[number + 1 :]


def test_without_shuffling_samples_come_as_they_lie_in_every_epoch(urls):
    for epoch in range(3):
        assert keys(epoch_of(order(urls, shuffle=0), epoch=epoch)) == all_keys()


def test_order_depends_on_epoch_and_seed_and_on_nothing_else(urls):
    orders = {(seed, epoch): keys(epoch_of(order(urls, seed=seed), epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(read) for read in orders.values()}) == 4
    assert keys(epoch_of(order(urls, seed=1), epoch=1)) == orders[1, 1]


def test_shuffling_mixes_the_shards_within_a_window_and_not_beyond(urls):
    read = keys(epoch_of(order(urls, shuffle=6)))
    windows = [read[first : first + 6] for first in range(0, len(read), 6)]
    assert any(len({int(key) // 100 for key in window}) > 1 for window in windows)
    assert any(window != sorted(window) for window in windows)
    again = keys(epoch_of(order(urls, shuffle=1)))
    assert [sorted(window) for window in windows] == [sorted(again[f : f + 6]) for f in range(0, len(again), 6)]


def test_streams_that_rotate_read_every_shard_over_the_epochs(urls):
    for stream in range(3):
        read = {
            key
            for epoch in range(3)
            for key in keys(epoch_of(order(urls, shuffle=0, num_streams=3, num_groups=3), epoch=epoch, stream=stream))
        }
        assert sorted(read) == all_keys()


@pytest.mark.parametrize("shuffle", [0, 4])
def test_a_shard_that_cant_be_used_is_told_once_and_the_others_are_read(urls, tmp_path, shuffle):
    garbage, missing, unsorted = tmp_path / "garbage.tar", tmp_path / "missing.tar", tmp_path / "unsorted.tar"
    garbage.write_bytes(b"no tar at all" * 1000)
    images = [(f"{number}.jpg", b"i") for number in range(3)]
    write_tar(unsorted, [*images, *((f"{number}.txt", b"c") for number in range(3))])
    mixed = [urls[0], str(garbage), urls[2], str(missing), str(unsorted), urls[5]]
    whole = epoch_of(order(mixed, shuffle=shuffle))
    failures = {item.url: item.why for item in whole if isinstance(item, ShardFailure)}
    assert sum(isinstance(item, ShardFailure) for item in whole) == 3
    assert "no tar archive" in failures[str(garbage)] or "not a tar archive" in failures[str(garbage)]
    assert "no such file" in failures[str(missing)]
    assert "not sorted" in failures[str(unsorted)]
    good = [item for item in whole if isinstance(item, StreamSample) and item.url != str(unsorted)]
    assert sorted(keys(good)) == [key for key in all_keys() if int(key) // 100 in (0, 2, 5)]
    for number, item in enumerate(whole):
        assert epoch_of(order(mixed, shuffle=shuffle), start=item.after) == whole[number + 1 :]
