import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from webdataset import WebDataset

from clipfilter_wds.shards.tar_writer import TarWriter
from clipfilter_wds.storage.publish import publish, publish_json, remove_leftovers, remove_leftovers_of
from clipfilter_wds.types import Member
from tests.support.toys import read_shard, tar_members

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


# --- tars ---


def tar_of(members: list[tuple[str, bytes]]) -> tuple[bytes, str]:
    """A tar, and the digest that its writer gave."""
    file = io.BytesIO()
    tar = TarWriter(file)
    for name, data in members:
        tar.add(Member(name=name, extension=name.rpartition(".")[2], data=data))
    digest = tar.finish()
    return file.getvalue(), digest


def byte_name(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


NAMES = [
    "000000000.jpg",
    "a/b/000000001.jpg",
    "x" * 99 + ".jpg",
    "d/" * 60 + "long.jpg",
    "y" * 3000 + ".jpg",
    "ünïcode 画像 🐈.jpg",
    "ü" * 60 + ".jpg",
    byte_name(b"\xff\xfe odd.jpg"),
    byte_name(b"\xe9" * 150 + b".jpg"),
    " leading and trailing .jpg ",
    "new\nline.jpg",
    "UPPER.JPG",
]
MEMBERS = [(name, name.encode("utf-8", "surrogateescape") * (7 * number)) for number, name in enumerate(NAMES)]


@pytest.fixture
def tar_path(tmp_path) -> Path:
    path = tmp_path / "0.tar"
    path.write_bytes(tar_of(MEMBERS)[0])
    return path


def test_names_and_bytes_come_back_as_they_were(tar_path):
    with tarfile.open(tar_path, encoding="utf-8", errors="surrogateescape") as tar:
        assert [(info.name, tar.extractfile(info).read()) for info in tar] == MEMBERS
    samples, end = read_shard(tar_path.read_bytes())
    assert [(member.name, member.data) for sample in samples for member in sample.members] == MEMBERS
    assert not end.torn


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.binary(min_size=1, max_size=300).filter(lambda name: b"\0" not in name and name.strip(b"/")),
            st.binary(max_size=2000),
        ),
        max_size=5,
    )
)
def test_members_of_any_name_and_bytes_come_back(members):
    members = [(byte_name(name), data) for name, data in members]
    data, digest = tar_of(members)
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as tar:
        assert [(info.name, tar.extractfile(info).read()) for info in tar] == members
    assert digest == hashlib.sha256(data).hexdigest()
    assert len(data) % tarfile.RECORDSIZE == 0
    assert data.endswith(bytes(2 * tarfile.BLOCKSIZE))


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar")
def test_gnu_tar_lists_the_names_without_complaint(tar_path):
    run = subprocess.run(["tar", "-tf", tar_path, "--quoting-style=literal"], capture_output=True, check=True)
    assert run.stdout == b"".join(name.encode("utf-8", "surrogateescape") + b"\n" for name in NAMES)
    assert not run.stderr


def test_webdataset_reads_the_samples(tmp_path):
    members = [
        (f"{folder}{key:04d}.{ext}", os.urandom(9))
        for key, folder in enumerate(["", "a/" * 70])
        for ext in ("jpg", "txt")
    ]
    path = tmp_path / "0.tar"
    path.write_bytes(tar_of(members)[0])
    found = [
        (f"{sample['__key__']}.{extension}", sample[extension])
        for sample in WebDataset(str(path), shardshuffle=False)
        for extension in ("jpg", "txt")
    ]
    assert found == members


def test_equal_members_give_equal_bits_at_any_time(monkeypatch):
    first, digest = tar_of(MEMBERS)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    again = tar_of(MEMBERS)
    assert again == (first, digest)
    assert digest == hashlib.sha256(first).hexdigest()


def test_owner_time_and_mode_are_fixed(tar_path):
    with tarfile.open(tar_path) as tar:
        facts = {(info.mtime, info.uid, info.gid, info.uname, info.gname, oct(info.mode), info.type) for info in tar}
    assert facts == {(0, 0, 0, "", "", "0o644", tarfile.REGTYPE)}


def test_a_tar_without_members_is_an_empty_archive(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(tar_of([])[0])
    assert tar_members(path) == []
    assert read_shard(path.read_bytes())[1].torn is False


def test_a_tar_of_its_own_members_is_the_same_tar(tar_path):
    samples, _ = read_shard(tar_path.read_bytes())
    members = [(member.name, member.data) for sample in samples for member in sample.members]
    assert tar_of(members)[0] == tar_path.read_bytes()
