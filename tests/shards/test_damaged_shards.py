"""Shards that were cut or damaged anywhere: whole samples come out, and no pair is ever mixed."""

import re
import shutil
import subprocess
import tarfile
import tracemalloc
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.types import DropReason, ShardEnd, ShardError
from tests.support.tars import (
    BLOCK,
    END,
    PAIR_A,
    PAIR_B,
    SHARDS,
    Shard,
    check_accounting,
    each_format,
    end_of,
    key_of,
    plain,
)
from tests.support.toys import raw_member, read_shard, tar_bytes

# --- cut shards ---


def check_cut(shard: Shard, cut: int) -> None:
    """Reading the first ``cut`` bytes gives the whole samples, at most one torn one, and nothing mixed."""
    data = shard.data[:cut]
    if 0 < cut < BLOCK:
        with pytest.raises(ShardError, match="not a tar archive"):
            read_shard(data)
        return
    samples, end = read_shard(data)
    check_accounting(samples, end)
    assert end.torn == (cut < shard.end + BLOCK)
    assert end.num_samples == sum(info.offset_data <= cut for info in shard.begins)
    num_whole = end.num_samples - end.torn if samples else 0
    assert plain(samples[:num_whole]) == shard.samples[:num_whole]
    assert [sample.key for sample in samples] == [key for key, _ in shard.samples[: len(samples)]]


@each_format
def test_torn_shard_never_mixes_a_pair_wherever_it_was_cut_between_blocks(tar_format):
    shard = SHARDS[tar_format]
    for cut in range(0, len(shard.data) + 1, BLOCK):
        check_cut(shard, cut)


@settings(max_examples=150)
@given(st.sampled_from(sorted(SHARDS)), st.data())
def test_torn_shard_never_mixes_a_pair_wherever_it_was_cut(tar_format, data):
    shard = SHARDS[tar_format]
    check_cut(shard, data.draw(st.integers(0, shard.end + 3 * BLOCK), label="cut"))


@pytest.mark.parametrize("num_whole", [1, 4, 5])
def test_a_cut_between_two_samples_tears_the_last_one_because_it_may_have_had_more(num_whole):
    shard = SHARDS["gnu"]
    end_of_last = end_of(shard.infos[3 * num_whole - 1])
    samples, end = read_shard(shard.data[:end_of_last])
    assert plain(samples[:-1]) == shard.samples[: num_whole - 1]
    assert samples[-1].problem is DropReason.TORN
    assert end == ShardEnd(num_samples=num_whole, torn=True, num_bytes=end_of_last, signature=end.signature)


def test_the_torn_sample_of_one_shard_and_the_first_of_the_next_stay_apart():
    first, second = SHARDS["gnu"], Shard([("0004.txt", b"another caption"), ("0004.jpg", b"i")], "gnu")
    cut = first.infos[13].offset  # after the last sample's image
    samples = [*read_shard(first.data[:cut])[0], *read_shard(second.data)[0]]
    assert [sample.problem for sample in samples] == [None] * 4 + [DropReason.TORN, None]
    assert plain(samples[-1:]) == second.samples


@each_format
def test_what_is_read_to_be_copied_is_what_is_read_wherever_the_shard_was_cut(tar_format):
    shard = SHARDS[tar_format]
    for cut in [*range(BLOCK, shard.end, 300), *range(0, len(shard.data), BLOCK)]:
        samples, end = read_shard(shard.data[:cut])
        to_copy, same_end = read_shard(shard.data[:cut], to_copy=True)
        assert end == same_end
        assert [replace(sample, stored=()) for sample in to_copy] == [replace(sample, members=()) for sample in samples]
        assert [
            [(stored.name, stored.window[stored.data : stored.data + stored.size]) for stored in sample.stored]
            for sample in to_copy
        ] == [[(member.name, member.data) for member in sample.members] for sample in samples]


# --- damaged shards ---


flips = st.lists(
    st.tuples(st.integers(0, min(shard.end for shard in SHARDS.values())), st.integers(1, 255)), min_size=1, max_size=4
)


def flipped(data: bytes, flips: list[tuple[int, int]]) -> tuple[bytes, set[int]]:
    """The data with some bytes changed, and where."""
    changed = bytearray(data)
    for position, mask in flips:
        changed[position] ^= mask
    return bytes(changed), {position for position, (a, b) in enumerate(zip(data, changed, strict=True)) if a != b}


@settings(max_examples=300)
@given(st.sampled_from(sorted(SHARDS)), flips)
def test_flipped_bytes_never_mix_what_they_did_not_touch(tar_format, flips):
    shard = SHARDS[tar_format]
    data, positions = flipped(shard.data, flips)
    try:
        samples, end = read_shard(data)
    except ShardError:
        return
    check_accounting(samples, end)
    untouched = shard.untouched(positions)
    for sample in samples:
        found = {member.name: member.data for member in sample.members}
        assert {name: found[name] for name in found if name in untouched} == {
            name: untouched[name] for name in found if name in untouched
        }
    # All that lies before the damage is found, but for the last sample, which may have lost its end.
    num_before = sum(
        all(end_of(info) <= min(positions, default=0) for info in shard.infos if key_of(info.name) == key)
        for key, _ in shard.samples
    )
    num_known = max(0, num_before - 1)
    assert plain(samples[:num_known]) == shard.samples[:num_known]


@settings(max_examples=150)
@given(st.lists(st.binary(min_size=BLOCK, max_size=BLOCK), max_size=3), st.integers(0, 15))
def test_garbage_in_place_of_a_member_ends_the_shard_there(garbage, number):
    shard = SHARDS["gnu"]
    offset = shard.infos[number].offset if number < len(shard.infos) else shard.end
    data = shard.data[:offset] + b"".join(garbage)
    if not offset and any(data[:BLOCK]):
        with pytest.raises(ShardError, match="not a tar archive"):
            read_shard(data)
        return
    samples, end = read_shard(data)
    check_accounting(samples, end)
    num_whole = max(0, number - 1) // 3
    assert plain(samples[:num_whole]) == shard.samples[:num_whole]


@pytest.mark.parametrize("number", [3, 6, 12])
def test_a_zeroed_header_with_members_after_it_is_torn_and_not_the_end(number):
    """A hole in a file, such as a crash leaves, is no end-of-archive mark: samples after it would be lost uncounted."""
    shard = SHARDS["ustar"]
    data = bytearray(shard.data)
    at = shard.infos[number].offset
    data[at : at + BLOCK] = bytes(BLOCK)
    samples, end = read_shard(bytes(data))
    check_accounting(samples, end)
    assert end.torn
    assert plain(samples[:-1]) == shard.samples[: number // 3 - 1]


@settings(max_examples=200)
@given(st.sampled_from(sorted(SHARDS)), flips | st.just([]), st.sets(st.integers(0, 5)), st.booleans())
def test_what_is_wanted_never_changes_how_samples_are_counted(tar_format, flips, wanted, pair_only):
    data, _ = flipped(SHARDS[tar_format].data, flips)
    try:
        samples, end = read_shard(data)
    except ShardError as error:
        with pytest.raises(ShardError, match=re.escape(str(error))):
            read_shard(data, wanted=wanted.__contains__, pair_only=pair_only)
        return
    some, end_of_some = read_shard(data, wanted=wanted.__contains__, pair_only=pair_only)
    assert end_of_some == end
    expected = [sample for sample in samples if sample.index in wanted]
    assert [(sample.key, sample.index, sample.problem) for sample in some] == [
        (sample.key, sample.index, sample.problem) for sample in expected
    ]
    for found, full in zip(some, expected, strict=True):
        assert found.members == tuple(m for m in full.members if not pair_only or m.extension in ("jpg", "json", "txt"))


@pytest.mark.parametrize("wanted", [True, False])
def test_eight_gigabytes_in_a_header_of_a_small_file_take_no_memory(wanted):
    info = tarfile.TarInfo("b.jpg")
    info.size = 8 << 30
    data = tar_bytes(PAIR_A)[: 4 * BLOCK] + raw_member(info, b"little")
    tracemalloc.start()
    try:
        samples, end = read_shard(
            data, SampleLayout(max_member_bytes=16 << 30), wanted=lambda index: wanted or index == 0
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert plain(samples[:1]) == [("a", {"jpg": b"1", "txt": b"2"})]
    assert (end.num_samples, end.torn) == (2, True)


@pytest.mark.parametrize("size", [-1, -511, -512, -513, -(8 << 30)])
@pytest.mark.parametrize("extension", ["jpg", "json"])
@pytest.mark.parametrize(("wanted", "pair_only"), [(True, False), (True, True), (False, False)])
def test_a_negative_size_ends_the_shard_as_torn_however_it_is_read(size, extension, wanted, pair_only):
    info = tarfile.TarInfo(f"b.{extension}")
    info.size = size
    data = tar_bytes(PAIR_A)[: 4 * BLOCK] + raw_member(info) + tar_bytes([("c.jpg", b""), ("c.txt", b"")])
    _, end = read_shard(data, wanted=lambda index: wanted, pair_only=pair_only)
    assert (end.num_samples, end.torn) == (2, True)


@pytest.mark.parametrize("records", [b"\xff\xfe", b"garbage\n", b"99999 path=a\n", b"0 a=b\n", b"18 size=not-a-no\n"])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_garbage_in_an_extended_header_is_torn_or_passed_over_and_never_an_exception(records, kind):
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(records)
    data = tar_bytes(PAIR_A)[: 4 * BLOCK] + raw_member(info, records) + tar_bytes(PAIR_B)
    samples, end = read_shard(data)
    check_accounting(samples, end)
    assert (samples[0].key, samples[0].index) == ("a", 0)
    original = dict([*PAIR_A, *PAIR_B])
    assert all(member.data in (original[member.name], b"") for sample in samples for member in sample.members)


def test_ten_thousand_extended_headers_in_a_row_are_torn_and_not_a_crash():
    info = tarfile.TarInfo("pax")
    info.type = tarfile.XHDTYPE
    samples, end = read_shard(tar_bytes(PAIR_A)[: 4 * BLOCK] + raw_member(info) * 10_000 + END)
    assert [sample.problem for sample in samples] == [DropReason.TORN]
    assert end.torn


# --- sparse members ---


def sparse_tar(tmp_path, tar_format: str) -> tuple[bytes, bytes]:
    """A tar that GNU tar made of a file with holes, between other members; and the bytes of that file."""
    with (tmp_path / "b.jpg").open("wb") as file:
        for position in (0, 100_000, 300_000, 500_000, 700_000, 900_000):
            file.seek(position)
            file.write(b"island")
        file.truncate(1_000_000)
    for name, data in [*PAIR_A, ("b.txt", b"4"), ("c.jpg", b"5"), ("c.txt", b"6")]:
        (tmp_path / name).write_bytes(data)
    names = ["a.jpg", "a.txt", "b.jpg", "b.txt", "c.jpg", "c.txt"]
    subprocess.run(["tar", f"--format={tar_format}", "-S", "-cf", "s.tar", *names], cwd=tmp_path, check=True)
    return (tmp_path / "s.tar").read_bytes(), (tmp_path / "b.jpg").read_bytes()


def has_gnu_tar() -> bool:
    tar = shutil.which("tar")
    return tar is not None and b"GNU" in subprocess.run([tar, "--version"], capture_output=True).stdout


needs_gnu_tar = pytest.mark.skipif(not has_gnu_tar(), reason="only GNU tar writes sparse members")


@needs_gnu_tar
@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_sparse_members_are_read_with_their_holes(tmp_path, tar_format):
    data, sparse = sparse_tar(tmp_path, tar_format)
    assert len(data) < len(sparse)
    samples, end = read_shard(data)
    assert plain(samples)[1] == ("b", {"jpg": sparse, "txt": b"4"})
    assert plain(samples)[2] == ("c", {"jpg": b"5", "txt": b"6"})
    check_accounting(samples, end)


@needs_gnu_tar
@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_a_torn_sparse_member_never_mixes_a_pair(tmp_path, tar_format):
    data, _ = sparse_tar(tmp_path, tar_format)
    whole = plain(read_shard(data)[0])
    for cut in range(4 * BLOCK, len(data), BLOCK):
        samples, end = read_shard(data[:cut])
        check_accounting(samples, end)
        usable = [sample for sample in samples if sample.problem is None]
        assert plain(usable) == whole[: len(usable)]
        assert read_shard(data[:cut], wanted=lambda index: False)[1] == end


@needs_gnu_tar
@settings(max_examples=60)
@given(flips=st.lists(st.tuples(st.integers(4 * BLOCK, 14 * BLOCK - 1), st.integers(1, 255)), min_size=1, max_size=3))
@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_a_damaged_sparse_map_is_torn_alike_however_it_is_read(tmp_path_factory, tar_format, flips):
    folder = tmp_path_factory.getbasetemp() / f"sparse-{tar_format}"
    if not folder.exists():
        folder.mkdir()
        sparse_tar(folder, tar_format)
    data, _ = flipped((folder / "s.tar").read_bytes(), flips)
    samples, end = read_shard(data)
    check_accounting(samples, end)
    assert read_shard(data, wanted=lambda index: False)[1] == end
