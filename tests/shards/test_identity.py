"""Whether a shard is the one that was scored."""

import gzip
import os
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfilter_wds.shards.identity import OtherShardError, check_identity, is_scored
from clipfilter_wds.shards.open import open_shard, shard_identity
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.types import ShardEnd, ShardError, ShardIdentity
from tests.support.tars import BLOCK, SHARDS, each_format
from tests.support.toys import tar_bytes, write_tar

#: The ways in which samples are read.
WAYS = [
    {},
    {"pair_only": True},
    {"to_copy": True},
    {"wanted": lambda index: index % 2 == 1},
    {"wanted": lambda _: False},
]


def write(folder: Path, data: bytes) -> str:
    path = folder / "0.tar"
    path.write_bytes(data)
    return str(path)


def ends(url: str) -> list[ShardEnd]:
    """What each way of reading finds at the end."""
    found = []
    for options in WAYS:
        with open_shard(url) as shard:
            *_, end = read_samples(shard, SampleLayout(), **options)
        found.append(end)
    return found


def check_recognized(url: str) -> ShardIdentity:
    """However a shard is read, its identity is the same, and that of a copy matches by its headers alone."""
    first, *others = (end.identity for end in ends(url))
    assert others == [first] * len(others)
    os.utime(url, ns=(0, 12345))
    assert check_identity(url, first, Path("t")) == first._replace(storage_version="12345")
    return first


# --- the signature ---


@each_format
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_every_way_to_read_a_shard_gives_its_signature(tmp_path, tar_format, pack):
    check_recognized(write(tmp_path, pack(SHARDS[tar_format].data)))


@each_format
def test_a_torn_shard_has_one_of_what_is_there(tmp_path, tar_format):
    shard = SHARDS[tar_format]
    cuts = range(shard.infos[0].offset_data + 1, shard.end, BLOCK)
    signatures = [check_recognized(write(tmp_path, shard.data[:size])).signature for size in cuts]
    assert len(set(signatures)) == len(shard.infos)  # a member's headers change it, its data do not


def test_a_compressed_shard_that_is_cut_has_one(tmp_path):
    data = gzip.compress(SHARDS["pax"].data)
    for size in range(len(data) // 2, len(data), 53):
        check_recognized(write(tmp_path, data[:size]))


def test_joined_shards_have_one_of_all_their_headers(tmp_path):
    one, other = tar_bytes([("a.jpg", b"1"), ("a.txt", b"2")]), tar_bytes([("b.jpg", b"3"), ("b.txt", b"4")])
    joined, first = (check_recognized(write(tmp_path, data)).signature for data in (one + other, one))
    assert joined != first


def tar_of(**changes) -> bytes:
    """A tar of a pair, a link and a long name; the last member has these attributes."""
    link = tarfile.TarInfo("a.png")
    link.type, link.linkname = tarfile.SYMTYPE, changes.pop("link", "a.jpg")
    last = tarfile.TarInfo(f"a.{'x' * 150}")
    last.size = 4
    for name, value in changes.items():
        setattr(last, name, value)
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
        tar.addfile(link)
        tar.addfile(last, BytesIO(b"data" * 2))
    return file.getvalue()


@pytest.mark.parametrize(
    "change",
    [{"name": f"a.{'y' * 150}"}, {"size": 5}, {"mtime": 1}, {"mtime": 0.5}, {"mode": 1}, {"link": "b.jpg"}],
    ids=["name", "size", "time", "fraction of a second", "mode", "link"],
)
def test_it_tells_a_shard_with_another_header(tmp_path, change):
    scored = ends(write(tmp_path, tar_of()))[0].identity
    url = write(tmp_path, tar_of(**change))
    assert Path(url).stat().st_size == scored.num_bytes
    with pytest.raises(OtherShardError, match=r"members of other names, sizes or times here than in 't\.parquet'"):
        check_identity(url, scored, Path("t.parquet"))


# --- what decides ---


def test_nothing_is_read_of_a_shard_of_the_same_size_and_time(tmp_path):
    url = str(write_tar(tmp_path / "0.tar", [("a.jpg", b"1"), ("a.txt", b"2")]))
    scored, time = ends(url)[0].identity, Path(url).stat().st_mtime_ns
    Path(url).write_bytes(bytes(scored.num_bytes))
    os.utime(url, ns=(time, time))
    assert is_scored(url, scored, Path("t"))
    os.utime(url)
    assert not is_scored(url, scored, Path("t"))


def test_only_who_reads_it_anyway_leaves_the_signature_for_later(tmp_path):
    url = write(tmp_path, tar_of())
    scored = replace(ends(url)[0], signature="other").identity
    assert check_identity(url, scored, Path("t"), is_read_next=True) == scored
    os.utime(url, ns=(0, 1))
    assert check_identity(url, scored, Path("t"), is_read_next=True) == scored._replace(storage_version="1")
    with pytest.raises(OtherShardError):
        check_identity(url, scored, Path("t"))


def test_another_size_is_told_with_both(tmp_path):
    url = write(tmp_path, tar_of())
    size = shard_identity(url).num_bytes
    with pytest.raises(OtherShardError, match=rf"{size} bytes here, 5 in 't\.parquet'"):
        check_identity(url, ShardIdentity(5), Path("t.parquet"))


def test_what_a_pipe_wrote_is_not_looked_for():
    scored = ShardIdentity(-1, None, "0" * 32)
    assert check_identity("pipe:exit 1", scored, Path("t")) == scored


def test_a_shard_that_is_gone_is_no_other_shard(tmp_path):
    with pytest.raises(ShardError, match="can't open it"):
        is_scored(str(tmp_path / "none.tar"), ShardIdentity(5), Path("t"))


IDENTITIES = st.builds(
    ShardIdentity,
    st.sampled_from([-1, 1, 2]),
    st.sampled_from([None, "a", "b"]),
    st.sampled_from([None, "x", "y"]),
)


@given(IDENTITIES, IDENTITIES)
def test_the_size_decides_then_the_signature_then_the_version(here, scored):
    matches = here.matches(scored)
    assert here.matches(here)
    if -1 not in (here.num_bytes, scored.num_bytes) and here.num_bytes != scored.num_bytes:
        assert matches is False
    elif None not in (here.signature, scored.signature):
        assert matches is (here.signature == scored.signature)
    elif here.storage_version == scored.storage_version:
        assert matches is True
    elif scored.signature is not None:
        assert matches is None
    else:  # the first tables have neither; a part of one has a version
        assert matches is (scored.storage_version is None)
