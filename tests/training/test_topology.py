import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfilter_wds.shards.split import split_by_worker
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.topology import Topology
from clipfilter_wds.world import World
from tests.support.toys import pair, write_shard


@given(num_shards=st.integers(1, 300), num_workers=st.integers(1, 64), times=st.integers(2, 8))
def test_no_other_multiple_of_the_workers_reads_fewer_shards_twice_than_the_default(num_shards, num_workers, times):
    def num_reads(num_streams):
        urls = [f"{number}.tar" for number in range(num_shards)]
        return sum(len(split_by_worker(urls, stream, num_streams)) for stream in range(num_streams))

    num_shared = num_shards % num_workers
    assert num_reads(num_workers) == num_shards + (num_workers - num_shared if num_shared else 0)
    assert num_reads(times * num_workers) >= num_reads(num_workers)


def test_by_default_each_worker_has_a_stream(tmp_path):
    dataset = ClipWebDataset(str(write_shard(tmp_path / "0.tar", [pair(0)])))
    topology = dataset.topology(World(rank=1, world_size=3), 2)
    assert topology.num_streams == 6
    assert [[*topology.streams_of(worker)] for worker in (0, 1)] == [[1], [4]]


@given(
    num_streams=st.integers(1, 100), world_size=st.integers(1, 12), num_workers=st.integers(1, 8), rotates=st.booleans()
)
def test_every_stream_has_one_worker_of_one_rank(num_streams, world_size, num_workers, rotates):
    ranks = [
        Topology(rank=rank, world_size=world_size, num_workers=num_workers, num_streams=num_streams, rotates=rotates)
        for rank in range(world_size)
    ]
    streams = [stream for one in ranks for worker in range(num_workers) for stream in one.streams_of(worker)]
    assert sorted(streams) == list(range(num_streams))
    for one in ranks:
        assert sorted(stream for worker in range(num_workers) for stream in one.streams_of(worker)) == [*one.streams]
        if rotates and one.streams:
            turns = {
                (stream + epoch) % num_streams for stream in one.streams for epoch in range(one.num_passes_for_all)
            }
            assert turns == set(range(num_streams))


def test_fewer_streams_than_ranks_are_refused(tmp_path):
    dataset = ClipWebDataset(str(write_shard(tmp_path / "0.tar", [pair(0)])))
    with pytest.raises(ValueError, match="num_streams is 2, which is too few for 3 ranks"):
        dataset.topology(World(rank=0, world_size=3), 1, num_streams=2)
