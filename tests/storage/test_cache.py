"""Shards of a real S3 server that are kept on disk, however the server fails."""

import os
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from clipfilter_wds.shards.names import output_names, public_url, shard_folder
from clipfilter_wds.shards.open import open_shard, shard_identity
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.types import ShardError
from tests.support.servers import now_and_then

DATA = os.urandom(1 << 20)


@pytest.fixture
def server(s3, short_pauses, cache):
    s3.reset()
    fsspec.filesystem("s3").pipe("bucket/kept/0.tar", DATA)
    yield s3
    s3.reset()


def read(url: str) -> bytes:
    with open_shard(url) as shard:
        assert shard.identity.num_bytes == len(DATA)
        return shard.stream.read()


@pytest.fixture(params=["s3", "http"])
def url(request, server):
    return "simplecache::" + ("s3:/" if request.param == "s3" else server.address) + "/bucket/kept/0.tar"


def test_a_shard_is_downloaded_once(server, url):
    assert read(url) == DATA
    server.reset()
    assert read(url) == DATA
    assert server.requests["GET"] == 0


def test_a_shard_that_was_replaced_is_downloaded_again(server, url):
    assert read(url) == DATA
    fsspec.filesystem("s3").pipe("bucket/kept/0.tar", DATA[::-1])
    fsspec.filesystem("s3").invalidate_cache()
    assert read(url) == DATA[::-1]


def test_a_connection_that_breaks_leaves_no_short_copy(server, url, cache):
    server.reset(lambda method, path: "busy" if method == "GET" else None)
    with pytest.raises(ShardError):
        read(url)
    assert not list(cache.iterdir())
    server.reset(now_and_then(1, cut=0.4))
    assert read(url) == DATA
    server.reset()
    assert read(url) == DATA
    assert [path.stat().st_size for path in cache.iterdir()] == [len(DATA)]


def test_several_who_fill_the_cache_at_once_all_get_the_shard(server, cache):
    server.reset(lambda method, path: "slow")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, ["simplecache::s3://bucket/kept/0.tar"] * 4)) == [DATA] * 4
    assert len(list(cache.iterdir())) == 1


def test_a_copy_that_lost_bytes_is_made_again(server, url, cache):
    assert read(url) == DATA
    os.truncate(next(cache.iterdir()), 1000)
    assert read(url) == DATA


def test_names_and_sizes_are_those_of_the_shard_itself(server):
    [url] = expand_shards("simplecache::s3://bucket/kept/*.tar")
    assert url == "simplecache::s3://bucket/kept/0.tar"
    assert output_names([url]) == {url: "0"}
    assert public_url(url) == "s3://bucket/kept/0.tar"
    assert shard_folder(url) == "s3://bucket/kept"
    assert shard_identity(url).num_bytes == len(DATA)


@pytest.mark.parametrize("how", ["filecache", "blockcache", "cached"])
def test_caches_that_may_deliver_wrong_bytes_are_refused(how):
    with pytest.raises(ValueError, match="may deliver wrong bytes; use simplecache::"):
        expand_shards(f"{how}::s3://bucket/0.tar")


def test_a_cache_needs_a_folder_and_a_remote_shard(server, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="on this machine already"):
        expand_shards(f"simplecache::{tmp_path}/0.tar")
    monkeypatch.delitem(fsspec.config.conf, "simplecache")
    with pytest.raises(ShardError, match="FSSPEC_SIMPLECACHE_CACHE_STORAGE"):
        read("simplecache::s3://bucket/kept/0.tar")
