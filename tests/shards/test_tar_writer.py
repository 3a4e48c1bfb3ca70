import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from webdataset import WebDataset

from clipfilter_wds.shards.tar_writer import TarWriter
from clipfilter_wds.types import Member
from tests.support.toys import read_shard, tar_members


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


@settings(max_examples=150)
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
