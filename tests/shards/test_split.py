import hypothesis.strategies as st
from hypothesis import given, settings

from clipfilter_wds.shards.split import split_by_worker


@settings(max_examples=200)
@given(st.integers(0, 40), st.integers(1, 20), st.integers(0, 12))
def test_every_block_of_every_shard_is_read_once_and_no_worker_idles(num_shards, num_workers, num_blocks):
    shards = [f"{number}.tar" for number in range(num_shards)]
    parts = [split_by_worker(shards, worker, num_workers) for worker in range(num_workers)]
    assert all(parts) == (num_shards > 0)
    read = [
        (part.url, block)
        for worker in parts
        for part in worker
        for block in range(num_blocks)
        if block % part.num_parts == part.part
    ]
    assert sorted(read) == sorted((url, block) for url in shards for block in range(num_blocks))
    for url in shards:
        sharers = [part for worker in parts for part in worker if part.url == url]
        assert sorted(part.part for part in sharers) == list(range(sharers[0].num_parts))
        assert {part.num_parts for part in sharers} == {len(sharers)}


@given(st.integers(1, 40), st.integers(1, 20))
def test_no_worker_has_more_than_one_shard_more_than_another(num_shards, num_workers):
    shards = [f"{number}.tar" for number in range(num_shards)]
    loads = [
        sum(1 / part.num_parts for part in split_by_worker(shards, worker, num_workers))
        for worker in range(num_workers)
    ]
    assert max(loads) - min(loads) < 1 + 1e-9
