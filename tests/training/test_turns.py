import gc

import pytest

from clipfilter_wds.training.dataset import ClipWebDataset, StreamWorker
from clipfilter_wds.training.stream import Position, StreamProgress, StreamSample
from clipfilter_wds.world import World
from tests.support.restore import write_numbered


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    numbers = [list(range(100 * shard, 100 * shard + 10)) for shard in range(6)]
    return write_numbered(tmp_path_factory.mktemp("turns"), numbers)


def read(scorer, shards, *, shuffle, num_streams=3, batch_size=4):
    """One epoch of a lone worker's streams."""
    dataset = ClipWebDataset(shards, scorer.preprocess, shuffle=shuffle)
    topology = dataset.topology(World(), 1, num_streams)
    streams = dict.fromkeys(topology.streams, StreamProgress())
    return iter(StreamWorker(dataset, topology, streams, batch_size=batch_size, epoch=0))


def test_without_shuffling_the_streams_take_turns_by_batches(scorer, shards):
    batches = list(read(scorer, shards, shuffle=0))
    assert [batch.stream for batch in batches] == [0, 1, 2] * 6
    assert [len(batch.rows) for batch in batches] == [4] * 15 + [0] * 3
    assert [batch.after.turns for batch in batches] == [1 + number // 3 for number in range(18)]


def test_with_shuffling_they_take_turns_by_windows_and_no_batch_holds_two(scorer, shards):
    batches = list(read(scorer, shards, shuffle=6))
    filled = [batch for batch in batches if len(batch.rows)]
    assert [(batch.stream, len(batch.rows)) for batch in filled[:6]] == [(0, 4), (0, 2), (1, 4), (1, 2), (2, 4), (2, 2)]
    assert all(batch.after.position.offset == 0 for batch in filled if len(batch.rows) == 2)


def test_a_stream_that_is_alone_fills_its_batches_across_windows(scorer, shards):
    batches = list(read(scorer, shards, shuffle=6, num_streams=1))
    assert [len(batch.rows) for batch in batches] == [4] * 15 + [0]


def test_streams_that_wait_for_their_turn_hold_no_samples(scorer, shards):
    def num_held():
        gc.collect()
        return sum(isinstance(item, StreamSample) for item in gc.get_objects())

    gc.freeze()  # all that is there already: going through it takes half a second
    try:
        held = [num_held() for _ in read(scorer, shards, shuffle=10, num_streams=6)]
    finally:
        gc.unfreeze()
    assert max(held) <= 10 + 6 + 1  # what is left of a window, and the last sample of each stream


def test_a_stream_that_is_through_leaves_the_turns_to_the_others(scorer, shards):
    dataset = ClipWebDataset(shards, scorer.preprocess)
    topology = dataset.topology(World(), 1, 2)
    streams = {0: StreamProgress(Position(epoch=1), turns=9), 1: StreamProgress(turns=9)}
    batches = list(StreamWorker(dataset, topology, streams, batch_size=7, epoch=0))
    assert {batch.stream for batch in batches} == {1}
    assert sum(len(batch.rows) for batch in batches) == 30
    assert batches[-1].after.position == Position(epoch=1)
