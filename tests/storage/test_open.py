import zipfile

import fsspec
import pytest

from clipfilter_wds.shards.urls import expand_shards
from clipfilter_wds.storage.open import file_state, is_glob, list_matches, open_file, open_once, open_pipe
from clipfilter_wds.types import ShardError
from tests.support.servers import now_and_then


@pytest.fixture
def archive(tmp_path) -> str:
    """The URL of a file in a zip archive, which holds ``hello``."""
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        archive.writestr("inner/a.bin", b"hello")
    return f"zip://inner/a.bin::{tmp_path}/files.zip"


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.pipe({"/x/a?b.bin": b"hello", "/x/c.bin": b""})
    yield fs
    fs.rm("/", recursive=True)


def test_a_file_of_any_storage_is_opened_with_its_size(tmp_path, memory, archive):
    path = tmp_path / "a b.bin"
    path.write_bytes(b"hello")
    for url in (str(path), f"file://{path}", "memory://x/a?b.bin", archive):
        file, state = open_file(url)
        with file:
            assert (file.read(), state.num_bytes) == (b"hello", 5)
        assert file_state(url) == state
        with open_once(url, seconds=10) as file:
            assert file.read() == b"hello"


@pytest.mark.parametrize("url", ["{folder}/none.bin", "memory://x/none.bin"])
def test_a_file_that_is_missing_is_the_storages_own_error(tmp_path, memory, url):
    for ask in (open_file, file_state):
        with pytest.raises(FileNotFoundError):
            ask(url.format(folder=tmp_path))


def test_matches_are_named_as_the_glob_was(tmp_path, memory):
    for name in ("b.bin", "a.bin", "c.txt"):
        (tmp_path / name).touch()
    assert list_matches(f"{tmp_path}/*.bin") == [f"{tmp_path}/a.bin", f"{tmp_path}/b.bin"]
    assert list_matches(f"file://{tmp_path}/*.bin") == [f"file://{tmp_path}/a.bin", f"file://{tmp_path}/b.bin"]
    assert list_matches("memory://x/*.bin") == ["memory:///x/a?b.bin", "memory:///x/c.bin"]
    assert list_matches("memory://x/*.none") == []


def test_shards_are_listed_by_a_server_that_fails_now_and_then(storage):
    storage.reset(now_and_then(3, busy=0.5))
    assert expand_shards("s3://bucket/0*.tar") == ["s3://bucket/0.tar"]
    storage.reset(lambda method, path: "busy")
    with pytest.raises(ValueError, match="can't list 's3://bucket/"):
        expand_shards("s3://bucket/other/*.tar")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("a.tar", False),
        ("a?.tar", True),
        ("a[01].tar", True),
        ("memory://x/a?.tar", True),
        ("https://host/a.tar?token=1", False),
        ("https://host/*.tar?token=1", True),
    ],
)
def test_a_question_mark_is_no_glob_on_the_web(url, expected):
    assert is_glob(url) is expected


@pytest.mark.parametrize("command", ["printf hello", "printf hello; kill -PIPE $$"])
def test_a_command_is_read_to_its_end(command):
    with open_pipe(f"pipe:{command}") as file:
        assert file.read() == b"hello"


@pytest.mark.parametrize("command", ["printf hello; exit 3", "printf hello; kill -KILL $$"])
def test_a_command_that_failed_is_an_error_when_it_has_been_read(command):
    failed = pytest.raises(ShardError, match=r"the command failed with exit status (3|-9)")
    with failed, open_pipe(f"pipe:{command}") as file:
        assert file.read() == b"hello"


def test_a_command_that_nobody_reads_on_has_not_failed():
    with open_pipe("pipe:cat /dev/zero") as file:
        assert file.read(5) == bytes(5)


def test_an_error_while_a_command_is_read_is_the_one_that_is_raised():
    with pytest.raises(KeyError), open_pipe("pipe:exit 3"):
        raise KeyError
