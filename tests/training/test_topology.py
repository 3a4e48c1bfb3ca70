import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.stream import StreamOrder
from clipfilter_wds.training.topology import Topology
from clipfilter_wds.world import World
from tests.support.toys import pair, write_shard


def num_reads(num_shards, world_size, num_workers, epoch=0):
    """How often a shard is opened in an epoch, by all workers together."""
    urls = [f"{number}.tar" for number in range(num_shards)]
    num_streams = world_size * num_workers
    order = StreamOrder(urls=urls, shuffle=10, seed=0, num_streams=num_streams, num_groups=world_size)
    parts = [part for stream in range(num_streams) for part in order.parts(epoch, stream)]
    assert {url: sorted(part.part for part in parts if part.url == url) for url in urls} == {
        part.url: list(range(part.num_parts)) for part in parts
    }
    return len(parts)


@settings(max_examples=50)
@given(num_shards=st.integers(1, 300), world_size=st.integers(1, 16), num_workers=st.integers(1, 16))
def test_only_ranks_share_shards_where_there_is_one_for_each_worker(num_shards, world_size, num_workers):
    num_shared = num_shards % world_size
    reads = num_reads(num_shards, world_size, num_workers, epoch=3)
    if num_shards >= world_size * num_workers:
        assert reads == num_shards + (world_size - num_shared if num_shared else 0)
    else:
        assert reads >= world_size * num_workers  # all have something to do


@pytest.mark.parametrize("num_shards", [7, 100])
@pytest.mark.parametrize("num_workers", range(1, 8))
def test_a_lone_rank_reads_each_shard_once(num_shards, num_workers):
    assert num_reads(num_shards, 1, num_workers) == num_shards


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8, 10])
@pytest.mark.parametrize("num_workers", [1, 4, 8])
def test_ranks_read_few_shards_twice(world_size, num_workers):
    assert num_reads(100, world_size, num_workers) <= 110


@given(
    shards_per_rank=st.integers(4, 20),
    world_size=st.integers(1, 8),
    num_workers=st.integers(1, 4),
    epoch=st.integers(0, 9),
)
def test_all_ranks_have_the_same_work(shards_per_rank, world_size, num_workers, epoch):
    urls = [f"{number}.tar" for number in range(shards_per_rank * world_size)]
    num_streams = world_size * num_workers
    order = StreamOrder(urls=urls, shuffle=0, seed=0, num_streams=num_streams, num_groups=world_size)
    for rank in range(world_size):
        streams = range(rank, num_streams, world_size)
        assert sum(len(order.parts(epoch, stream)) for stream in streams) == shards_per_rank


def test_by_default_each_worker_has_a_stream(tmp_path):
    dataset = ClipWebDataset(str(write_shard(tmp_path / "0.tar", [pair(0)])))
    topology = dataset.topology(World(rank=1, world_size=3), 2)
    assert topology.num_streams == 6
    assert [[*topology.streams_of(worker)] for worker in (0, 1)] == [[1], [4]]


@given(
    num_streams=st.integers(1, 100),
    world_size=st.integers(1, 12),
    num_workers=st.integers(1, 8),
    num_groups=st.integers(1, 4),
)
def test_every_stream_has_one_worker_of_one_rank(num_streams, world_size, num_workers, num_groups):
    ranks = [
        Topology(
            rank=rank, world_size=world_size, num_workers=num_workers, num_streams=num_streams, num_groups=num_groups
        )
        for rank in range(world_size)
    ]
    streams = [stream for one in ranks for worker in range(num_workers) for stream in one.streams_of(worker)]
    assert sorted(streams) == list(range(num_streams))
    for one in ranks:
        assert sorted(stream for worker in range(num_workers) for stream in one.streams_of(worker)) == [*one.streams]
        if num_groups > 1 and one.streams:
            turns = {
                (stream + epoch) % num_streams for stream in one.streams for epoch in range(one.num_passes_for_all)
            }
            assert turns == set(range(num_streams))


def test_fewer_streams_than_ranks_are_refused(tmp_path):
    dataset = ClipWebDataset(str(write_shard(tmp_path / "0.tar", [pair(0)])))
    with pytest.raises(ValueError, match="num_streams is 2, which is too few for 3 ranks"):
        dataset.topology(World(rank=0, world_size=3), 1, num_streams=2)
