import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from clipfilter_wds.storage.paths import any_path
from clipfilter_wds.storage.publish import (
    check_writable,
    publish,
    publish_json,
    remove_leftovers,
    remove_leftovers_of,
)
from tests.support.servers import DATA, now_and_then

# --- publishing ---


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_file_appears_whole_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "new" / "folder" / "0.tar"
    with publish(path) as file:
        file.write(b"x" * (3 << 20))
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"x" * (3 << 20)
    assert files_in(tmp_path) == ["new/folder/0.tar"]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(b"old")
    with publish(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_checking_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path / "c" / "page.html", as_file=True)
    assert not [*tmp_path.iterdir()]


def test_a_folder_can_be_made_in_one_that_can_be_written_to(tmp_path):
    check_writable(Path("not", "yet", "there"))
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output in (tmp_path / "link", tmp_path / "link" / "out", Path("/proc/out"), tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match="can't write to output"):
            check_writable(output)


@pytest.mark.parametrize("as_file", [False, True])
def test_what_can_not_be_written_is_named_with_the_reason(tmp_path, as_file):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "out"
    with pytest.raises(ValueError, match=r"can't write to output '.*/file/out': (Not a directory|File exists)"):
        check_writable(output, as_file=as_file)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        check_writable(tmp_path, as_file=True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_exception_in_the_block_leaves_nothing_of_it(tmp_path, error, old):
    path = tmp_path / "0.tar"
    if old is not None:
        path.write_bytes(old)

    def write_half():
        with publish(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert files_in(tmp_path) == ([] if old is None else ["0.tar"])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_that_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        publish_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~umask


def test_a_name_as_long_as_file_systems_allow_is_published(tmp_path):
    path = tmp_path / ("x" * 240 + ".tar")
    with publish(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"


def test_json_is_published_as_it_was_given(tmp_path):
    content = {"shard": "ü.tar", "dropped": {"torn": 1}, "sha256": None}
    publish_json(tmp_path / "0_stats.json", content)
    assert json.loads((tmp_path / "0_stats.json").read_text()) == content


def test_two_writers_of_one_file_never_mix(tmp_path):
    path = tmp_path / "0.tar"
    with publish(path) as first, publish(path) as second:
        first.write(b"1" * 5000)
        second.write(b"2" * 5000)
        first.write(b"1" * 5000)
    assert path.read_bytes() == b"1" * 10_000
    assert files_in(tmp_path) == ["0.tar"]


# --- leftovers ---


WRITE_AND_WAIT = """
import sys
from pathlib import Path
from clipfilter_wds.storage.publish import publish

with publish(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.readline()
"""


class Writer:
    """Another process that is in the midst of writing a file."""

    def __init__(self, path: Path) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", WRITE_AND_WAIT, path], **pipes)
        assert self.process.stdout.readline() == "writing\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def finish(self) -> int:
        self.process.communicate("\n")
        return self.process.returncode


def test_leftovers_of_a_dead_writer_go_and_those_of_a_live_one_stay(tmp_path):
    alive, dead = Writer(tmp_path / "sub" / "alive.tar"), Writer(tmp_path / "sub" / "dead.tar")
    dead.kill()
    (tmp_path / "sub" / "other.tmp").touch()
    assert len(files_in(tmp_path)) == 3
    remove_leftovers(tmp_path)
    left = files_in(tmp_path)
    assert len(left) == 2
    assert not any("dead" in name for name in left)
    assert alive.finish() == 0
    assert files_in(tmp_path) == ["sub/alive.tar", "sub/other.tmp"]
    assert (tmp_path / "sub" / "alive.tar").read_bytes() == b"half"


@pytest.mark.parametrize("name", ["0.tar", "x[1]*.tar"])
def test_only_the_leftovers_of_one_file_go_when_it_is_named(tmp_path, name):
    alive = Writer(tmp_path / name)
    for other in (name, "10.tar", "x1y.tar"):
        Writer(tmp_path / other).kill()
    assert len(files_in(tmp_path)) == 4
    remove_leftovers_of(tmp_path / name)
    assert len(files_in(tmp_path)) == 3
    assert alive.finish() == 0
    assert [file for file in files_in(tmp_path) if file.removeprefix(".").startswith(name)] == [name]


def test_no_leftover_looks_like_a_shard_or_a_table(tmp_path):
    writer = Writer(tmp_path / "0.tar")
    writer.kill()
    assert len(files_in(tmp_path)) == 1
    for pattern in ("*.tar", "*.parquet", "*.json", "*_stats*"):
        assert not list(tmp_path.glob(pattern))


def test_a_file_of_this_process_that_is_being_written_stays(tmp_path):
    with publish(tmp_path / "0.tar") as file:
        file.write(b"half")
        remove_leftovers(tmp_path)
    assert (tmp_path / "0.tar").read_bytes() == b"half"


def test_a_folder_without_leftovers_or_none_at_all_is_fine(tmp_path):
    (tmp_path / "0.tar").touch()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "missing")
    assert files_in(tmp_path) == ["0.tar"]


# --- object storage ---


def test_a_file_is_uploaded_whole_by_a_server_that_fails_now_and_then(storage):
    storage.reset(now_and_then(2, cut=0.3, busy=0.3))
    for number in range(4):
        with publish(any_path(f"s3://bucket/uploaded/{number}.tar")) as file:
            file.write(DATA)
    storage.reset()
    assert all(any_path(f"s3://bucket/uploaded/{number}.tar").read_bytes() == DATA for number in range(4))


def test_nothing_appears_when_writing_fails_or_the_server_is_gone(storage):
    path = any_path("s3://bucket/uploaded/never.tar")

    def write_half():
        with publish(path) as file:
            file.write(DATA)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert not path.is_file()
    storage.reset(lambda method, path: "cut")
    with pytest.raises(OSError, match=r"can't write 's3://bucket/uploaded/never\.tar': "):
        publish_json(path, {})
    storage.reset()
    assert not path.is_file()
