import fsspec
import pytest

from clipfilter_wds.storage import errors as remote
from clipfilter_wds.storage.errors import ChangedError
from clipfilter_wds.storage.reader import RemoteReader
from clipfilter_wds.types import ShardError
from tests.support.servers import DATA, FailingProxy, now_and_then
from tests.support.toys import read_whole


def urls(storage: FailingProxy) -> list[str]:
    return ["s3://bucket/0.tar", f"{storage.address}/bucket/0.tar"]


@pytest.mark.parametrize("kind", ["cut", "busy", "slow"])
@pytest.mark.parametrize("scheme", [0, 1], ids=["s3", "http"])
def test_a_server_that_fails_now_and_then_delivers_every_byte(storage, scheme, kind):
    storage.reset(now_and_then(1, **{kind: 0.25}))
    for _ in range(6):
        assert read_whole(urls(storage)[scheme]) == DATA
    assert storage.done[kind] > 0


@pytest.mark.parametrize("scheme", [0, 1], ids=["s3", "http"])
def test_a_server_that_cuts_every_connection_never_delivers_a_short_shard(storage, scheme):
    storage.reset(lambda method, path: "cut" if method == "GET" else None)
    try:
        data = read_whole(urls(storage)[scheme])
    except ShardError as error:
        assert "reading failed at byte" in str(error)  # noqa: PT017  # either outcome is right
    else:
        assert data == DATA  # it was taken up at the right byte each time
    assert storage.done["cut"] > 1


@pytest.mark.parametrize("scheme", [0, 1], ids=["s3", "http"])
def test_a_server_that_stays_busy_fails_the_shard_after_all_attempts(storage, scheme):
    storage.reset(lambda method, path: "busy")
    with pytest.raises(ShardError, match="can't open it: "):
        read_whole(urls(storage)[scheme])
    assert storage.done["busy"] > len(remote.RETRY_SECONDS)


@pytest.mark.parametrize("scheme", [0, 1], ids=["s3", "http"])
def test_a_shard_that_is_missing_is_not_asked_for_again(storage, scheme):
    storage.reset(lambda method, path: "missing")
    with pytest.raises(ShardError, match="can't open it: there is no such file"):
        read_whole(urls(storage)[scheme])
    assert storage.done["missing"] <= 3


@pytest.mark.parametrize("name", ["folder", "folder/below", ""])
def test_a_folder_is_no_empty_shard(storage, name):
    fsspec.filesystem("s3").pipe("bucket/folder/below/0.tar", DATA)
    url = f"s3://bucket/{name}".rstrip("/")
    with pytest.raises(ShardError, match=f"can't open it: it is a folder; name its shards: {url}/\\*.tar"):
        read_whole(url)


def test_upper_and_lower_case_are_the_same_in_a_scheme(storage):
    assert read_whole("S3://bucket/0.tar") == DATA
    assert read_whole(storage.address.replace("http", "HTTP") + "/bucket/0.tar") == DATA


def test_a_shard_that_is_replaced_between_two_connections_is_never_mixed(storage):
    fs = fsspec.filesystem("s3")
    for url in ("s3://bucket/changing.tar", f"{storage.address}/bucket/changing.tar"):
        storage.reset()
        fs.pipe("bucket/changing.tar", DATA)
        reader = RemoteReader(url)
        assert reader.read(1000) == DATA[:1000]
        fs.pipe("bucket/changing.tar", DATA[::-1])
        reader._disconnect()
        with pytest.raises(ChangedError, match="it changed while it was being read"):
            reader.read(1000)
        reader.close()
