import errno
import multiprocessing
import os
from pathlib import Path

import fsspec
import pytest

from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.storage import errors as remote
from clipfilter_wds.storage.errors import ChangedError, may_pass, reason, without_secrets
from clipfilter_wds.storage.paths import any_path
from clipfilter_wds.storage.publish import publish, publish_json
from clipfilter_wds.storage.reader import RemoteReader
from clipfilter_wds.types import ShardError
from tests.support.servers import FailingProxy, now_and_then

DATA = os.urandom(1 << 20)


@pytest.fixture(scope="module")
def proxy(s3):
    """A proxy, that fails when told to, in front of a real S3 server with ``bucket/0.tar``."""
    fsspec.filesystem("s3").pipe("bucket/0.tar", DATA)
    return s3


@pytest.fixture
def storage(proxy, short_pauses):
    proxy.reset()
    yield proxy
    proxy.reset()


def urls(storage: FailingProxy) -> list[str]:
    return ["s3://bucket/0.tar", f"{storage.address}/bucket/0.tar"]


def read_whole(url: str) -> bytes:
    with open_shard(url) as shard:
        return shard.stream.read()


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


def test_a_file_is_uploaded_whole_by_a_server_that_fails_now_and_then(storage):
    storage.reset(now_and_then(2, cut=0.3, busy=0.3))
    for number in range(4):
        with publish(any_path(f"s3://bucket/uploaded/{number}.tar")) as file:
            file.write(DATA)
    storage.reset()
    assert all(any_path(f"s3://bucket/uploaded/{number}.tar").read_bytes() == DATA for number in range(4))


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


def test_nothing_appears_when_writing_fails_or_the_server_is_gone(storage):
    path = any_path("s3://bucket/uploaded/never.tar")

    def write_half():
        with publish(path) as file:
            file.write(DATA)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert not path.exists()
    storage.reset(lambda method, path: "cut")
    with pytest.raises(OSError, match=r"can't write 's3://bucket/uploaded/never\.tar': "):
        publish_json(path, {})
    storage.reset()
    assert not path.exists()


def test_shards_are_listed_by_a_server_that_fails_now_and_then(storage):
    storage.reset(now_and_then(3, busy=0.5))
    assert expand_shards("s3://bucket/0*.tar") == ["s3://bucket/0.tar"]
    storage.reset(lambda method, path: "busy")
    with pytest.raises(ValueError, match="can't list 's3://bucket/"):
        expand_shards("s3://bucket/other/*.tar")


def test_the_web_is_no_place_to_write_to():
    with pytest.raises(ValueError, match="can be read but not written to"):
        any_path("https://user:secret@host/out")


def test_an_output_is_local_unless_it_has_a_scheme(tmp_path):
    assert any_path(str(tmp_path)) == any_path(f"file://{tmp_path}") == tmp_path
    assert isinstance(any_path("~/x"), Path)
    assert any_path("~/x") == Path.home() / "x"


@pytest.mark.parametrize(
    "text",
    [
        "https://user:secret@host/0.tar",
        "https://secret@host/0.tar and https://host/1.tar",
        "404, message='Not Found', url='https://host/0.tar?X-Amz-Signature=secret&a=b'",
        "ftp://user:sec@secret@host/0.tar",
        "az://box/0.tar?sv=1&sig=secret: no",
    ],
)
def test_no_secret_of_a_url_is_left_in_a_text(text):
    assert "secret" not in without_secrets(text)
    assert "0.tar" in without_secrets(text)
    assert "secret" not in reason(OSError(text), "")


def test_no_part_of_a_url_that_a_library_quotes_gives_a_secret_away():
    url = "s3://key:secret@bucket/0.tar?token=hidden"
    for text in ("no bucket key:secret@bucket", "no key 0.tar?token=hidden", "secret is no password"):
        said = reason(OSError(text), url)
        assert "secret" not in said
        assert "hidden" not in said


def test_a_glob_stays_readable():
    assert without_secrets("no shard matches 's3://bucket/0?.tar'") == "no shard matches 's3://bucket/0?.tar'"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "input/output error"), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (ChangedError(), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, expected):
    assert may_pass(error) is expected
