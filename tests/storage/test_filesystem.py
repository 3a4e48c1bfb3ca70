import multiprocessing

import pytest

from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.storage.paths import any_path
from clipfilter_wds.storage.publish import publish_json
from tests.support.servers import DATA, now_and_then
from tests.support.toys import read_whole


@pytest.mark.timeout(120)
def test_parent_and_forked_workers_use_one_storage_at_once(storage):
    """A fork takes the parent's connections with it; neither may get in the other's way, as DataLoader workers do."""
    fork = multiprocessing.get_context("fork")
    for _ in range(5):
        assert read_whole("s3://bucket/0.tar") == DATA  # connections are open when the workers begin
        workers = [fork.Process(target=_read_twice) for _ in range(2)]
        for worker in workers:
            worker.start()
        for number in range(5):
            publish_json(any_path(f"s3://bucket/uploaded/{number}.json"), {})
        for worker in workers:
            worker.join(30)
            assert worker.exitcode == 0


def _read_twice() -> None:
    assert read_whole("s3://bucket/0.tar") == read_whole("s3://bucket/0.tar") == DATA


def test_shards_are_listed_by_a_server_that_fails_now_and_then(storage):
    storage.reset(now_and_then(3, busy=0.5))
    assert expand_shards("s3://bucket/0*.tar") == ["s3://bucket/0.tar"]
    storage.reset(lambda method, path: "busy")
    with pytest.raises(ValueError, match="can't list 's3://bucket/"):
        expand_shards("s3://bucket/other/*.tar")
