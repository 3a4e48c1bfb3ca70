"""Archives that were joined into one file, and whatever else can stand behind the end of one."""

import gzip
import io
import tarfile
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import zstandard
from hypothesis import given, settings

from clipfilter_wds.shards import open as opening
from clipfilter_wds.shards.open import OpenShard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.types import DropReason, Sample, ShardEnd, ShardError, ShardIdentity
from tests.support.tars import BLOCK, END, FORMATS, PAIR_A, PAIR_B, SHARDS, check_accounting, end_of, plain
from tests.support.toys import read_shard, tar_bytes

# Few keys, so that many come back in another archive; parts of samples, and all the sizes that padding knows.
sample = st.dictionaries(
    st.sampled_from(["jpg", "txt", "json"]), st.sampled_from([b"", b"x" * 511, b"y" * 512, b"z" * 1500]), min_size=1
)
samples = st.dictionaries(st.sampled_from(["a", "b", "c/d", "long-" * 30]), sample, max_size=3)


@st.composite
def archives(draw) -> bytes:
    """A whole archive, of any format and any padding, and maybe of nothing."""
    members = [(f"{key}.{ext}", data) for key, found in draw(samples).items() for ext, data in found.items()]
    tar_format = draw(st.sampled_from(sorted(FORMATS))) if all(len(name) < 99 for name, _ in members) else "gnu"
    whole = tar_bytes(members, format=FORMATS[tar_format])
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        end = max(map(end_of, tar), default=0)
    return whole[:end] + bytes(BLOCK * draw(st.sampled_from([2, 3, 20, 700])))


PACKERS = {
    "plain": lambda parts: b"".join(parts),
    "gzip members": lambda parts: b"".join(map(gzip.compress, parts)),
    "gzip": lambda parts: gzip.compress(b"".join(parts)),
    "zstd frames": lambda parts: b"".join(map(zstandard.ZstdCompressor().compress, parts)),
}


def unpacked(data: bytes) -> io.BufferedIOBase:
    return opening._unpack(opening._WholeRaw(io.BytesIO(data), len(data), "0.tar"))


def read_joined(data: bytes, **options) -> tuple[list[Sample], ShardEnd]:
    """What a shard with these bytes, compressed or not, yields."""
    shard = OpenShard(url="0.tar", stream=unpacked(data), identity=ShardIdentity(len(data)))
    *found, end = read_samples(shard, SampleLayout(), **options)
    return found, end


def one_by_one(parts: list[bytes]) -> list[Sample]:
    """The samples of each archive by itself, numbered through."""
    found = [sample for part in parts for sample in read_shard(part)[0]]
    return [replace(sample, index=index) for index, sample in enumerate(found)]


@settings(max_examples=150)
@given(st.lists(archives(), min_size=1, max_size=4), st.sampled_from(sorted(PACKERS)))
def test_any_archives_that_were_joined_read_as_the_samples_of_all_in_order(parts, packing):
    data = PACKERS[packing](parts)
    found, end = read_joined(data)
    assert found == one_by_one(parts)
    assert end == ShardEnd(num_samples=len(found), torn=False, num_bytes=len(data), signature=end.signature)


@settings(max_examples=100)
@given(st.lists(archives(), min_size=1, max_size=4))
def test_the_members_of_joined_archives_are_those_that_tar_finds_with_its_option_i(parts):
    data = b"".join(parts)
    with tarfile.open(fileobj=io.BytesIO(data), ignore_zeros=True) as tar:
        expected = [(info.name, tar.extractfile(info).read()) for info in tar]
    found, _ = read_joined(data)
    assert [(member.name, member.data) for sample in found for member in sample.members] == expected


@settings(max_examples=150)
@given(st.lists(archives(), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 5))
def test_parts_of_joined_archives_are_the_whole_and_what_is_copied_is_what_is_read(parts, num_parts, start):
    data = b"".join(parts)
    whole, end = read_joined(data)
    for part in range(num_parts):

        def wanted(index: int, part: int = part) -> bool:
            return index >= start and index % num_parts == part

        assert read_joined(data, wanted=wanted) == ([found for found in whole if wanted(found.index)], end)
    to_copy, same_end = read_joined(data, to_copy=True)
    assert end == same_end
    assert [
        [(stored.name, stored.window[stored.data : stored.data + stored.size]) for stored in found.stored]
        for found in to_copy
    ] == [[(member.name, member.data) for member in found.members] for found in whole]


@settings(max_examples=100)
@given(st.lists(archives(), max_size=3), st.sampled_from(sorted(SHARDS)), st.data())
def test_only_the_last_of_joined_archives_can_be_torn(parts, tar_format, data):
    last = SHARDS[tar_format]
    cut = data.draw(st.integers(BLOCK, last.end + 3 * BLOCK), label="cut")
    expected, end_alone = read_shard(last.data[:cut])
    found, end = read_joined(b"".join(parts) + last.data[:cut])
    check_accounting(found, end)
    assert end.torn == end_alone.torn
    before = one_by_one(parts)
    assert found == [*before, *(replace(sample, index=len(before) + sample.index) for sample in expected)]


@pytest.mark.parametrize("again", [PAIR_A, [("a.txt", b"6")], [("a.jpg", b"5")], [("a.json", b"{}")]])
def test_a_key_that_comes_back_in_the_next_archive_is_another_sample_whatever_it_lacks(again):
    found, end = read_shard(tar_bytes(PAIR_A) + tar_bytes(again))
    assert [[(member.name, member.data) for member in sample.members] for sample in found] == [PAIR_A, again]
    assert (end.num_samples, end.torn) == (2, False)


def test_an_archive_that_is_not_sorted_is_an_error_wherever_it_stands():
    unsorted = tar_bytes([("a.jpg", b""), *PAIR_B, ("a.txt", b"")])
    for parts in ([unsorted, tar_bytes(PAIR_A)], [tar_bytes(PAIR_A), unsorted]):
        with pytest.raises(ShardError, match="not sorted: members of 'a'"):
            read_shard(b"".join(parts))


# --- what is no archive ---


@settings(max_examples=100)
@given(st.binary(min_size=1, max_size=2000).filter(lambda data: any(data[:BLOCK])) | st.just(b"x" * 5000))
def test_bytes_behind_the_end_that_are_no_archive_mean_nothing(trailing):
    data = tar_bytes(PAIR_A) + trailing
    if opening.is_compressed(trailing) or trailing.endswith(bytes(2 * BLOCK)):
        return  # these mean something: see below
    found, end = read_shard(data)
    assert plain(found) == [("a", {"jpg": b"1", "txt": b"2"})]
    assert end == ShardEnd(num_samples=1, torn=False, num_bytes=len(data), signature=end.signature)


@pytest.mark.parametrize("num_blocks", [2, 8])
@pytest.mark.parametrize("follows", ["members", "end mark"])
def test_a_hole_in_an_archive_is_not_its_end(num_blocks, follows):
    """A crash leaves zeros where it likes; behind them comes the middle of a member, and then the rest."""
    rest = (tar_bytes(PAIR_B) if follows == "members" else END) + END
    found, end = read_shard(tar_bytes(PAIR_A)[: 4 * BLOCK] + bytes(num_blocks * BLOCK) + b"x" * BLOCK + rest)
    assert [sample.problem for sample in found] == [DropReason.TORN]
    assert end.torn


def test_a_lone_block_of_zeros_ends_an_archive_only_where_nothing_follows():
    archive = tar_bytes(PAIR_A)[: 5 * BLOCK]
    assert not read_shard(archive)[1].torn
    for follows in (tar_bytes(PAIR_B), b"x" * BLOCK):
        found, end = read_shard(archive + follows)
        assert [sample.problem for sample in found] == [DropReason.TORN]
        assert end.torn


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.ZstdCompressor().compress])
def test_a_compressed_archive_behind_one_that_is_not_is_an_error_and_not_passed_over(pack):
    with pytest.raises(ShardError, match="a compressed file stands behind the end"):
        read_joined(tar_bytes(PAIR_A) + pack(tar_bytes(PAIR_B)))
