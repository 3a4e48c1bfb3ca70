import io
import re
import shutil
import subprocess
import tarfile
import tracemalloc
from dataclasses import replace
from itertools import groupby

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.types import DropReason, ShardEnd, ShardError
from tests.support.toys import raw_member, read_shard, tar_bytes

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
BLOCK = tarfile.BLOCKSIZE

# The sizes lie on, beside and far from the borders of blocks.
SIZES = [0, 1, 511, 512, 513, 1500]
END = bytes(2 * BLOCK)


def content(name: str, size: int) -> bytes:
    """Bytes of a member that occur in no other member, empty ones aside."""
    return (name.encode() * (size // len(name.encode()) + 1))[:size]


def shard_members(tar_format: str) -> list[tuple[str, bytes]]:
    """Five samples of jpg, txt and json, some with names that need extended headers."""
    long = "" if tar_format == "ustar" else "long-" * 30 + "ü/"
    folders = ["", "a/", long, "", long]
    names = [f"{folder}{key:04d}.{ext}" for key, folder in enumerate(folders) for ext in ("jpg", "txt", "json")]
    return [(name, content(name, SIZES[number % len(SIZES)])) for number, name in enumerate(names)]


class Shard:
    """A whole tar, what it should be read as, and where its parts lie."""

    def __init__(self, members: list[tuple[str, bytes]], tar_format: str) -> None:
        self.data = tar_bytes(members, format=FORMATS[tar_format])
        self.contents = dict(members)
        with tarfile.open(fileobj=io.BytesIO(self.data)) as tar:
            self.infos = tar.getmembers()
        self.samples = [
            (key, {info.name.removeprefix(key + "."): self.contents[info.name] for info in infos})
            for key, infos in groupby(self.infos, lambda info: key_of(info.name))
        ]
        self.begins = [next(info for info in self.infos if key_of(info.name) == key) for key, _ in self.samples]
        self.end = end_of(self.infos[-1])

    def untouched(self, positions: set[int]) -> dict[str, bytes]:
        """The members that have no header or data at these positions."""
        return {
            info.name: self.contents[info.name]
            for info in self.infos
            if not any(info.offset <= position < end_of(info) for position in positions)
        }


def key_of(name: str) -> str:
    return re.fullmatch(r"((?:.*/)?[^./]+)\..*", name)[1]


def end_of(info: tarfile.TarInfo) -> int:
    return info.offset_data + -(-info.size // BLOCK) * BLOCK


def plain(samples) -> list[tuple[str, dict[str, bytes]]]:
    return [(sample.key, {member.extension: member.data for member in sample.members}) for sample in samples]


def check_accounting(samples, end: ShardEnd) -> None:
    """All samples come out, in order, and only the last of a torn shard is torn."""
    assert [sample.index for sample in samples] == list(range(end.num_samples))
    torn = [sample.index for sample in samples if sample.problem is DropReason.TORN]
    assert torn == ([end.num_samples - 1] if end.torn and samples else [])
    assert not any(sample.members for sample in samples if sample.problem is not None)


SHARDS = {name: Shard(shard_members(name), name) for name in FORMATS}
each_format = pytest.mark.parametrize("tar_format", FORMATS)


# --- whole shards ---


@each_format
def test_a_whole_shard_yields_its_samples_and_all_of_their_members_in_order(tar_format):
    shard = SHARDS[tar_format]
    samples, end = read_shard(shard.data)
    assert plain(samples) == shard.samples
    assert [member.name for sample in samples for member in sample.members] == list(shard.contents)
    assert end == ShardEnd(num_samples=5, torn=False, num_bytes=len(shard.data))
    check_accounting(samples, end)


@pytest.mark.parametrize("num_blocks", [1, 2, 20, 21])
def test_an_archive_of_nothing_but_its_end_mark_is_empty_and_whole(num_blocks):
    assert read_shard(bytes(BLOCK * num_blocks)) == (
        [],
        ShardEnd(num_samples=0, torn=False, num_bytes=BLOCK * num_blocks),
    )


def test_an_empty_file_is_torn_and_holds_no_sample():
    assert read_shard(b"") == ([], ShardEnd(num_samples=0, torn=True, num_bytes=0))


@pytest.mark.parametrize("size", [1, 100, BLOCK, 5000])
def test_a_file_that_is_no_tar_is_an_error(size):
    with pytest.raises(ShardError, match="not a tar archive"):
        read_shard(content("<html>404 not found</html>", size))


# --- grouping ---

name_alphabet = st.sampled_from(list("ab._-/ é\udcff"))
names = st.text(name_alphabet, min_size=1, max_size=12).map(lambda name: name + ".jpg") | st.text(name_alphabet).filter(
    bool
)


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


@settings(max_examples=300, deadline=None)
@given(names.filter(lambda name: not is_hidden(name) and name.rpartition("/")[2] and not name.startswith("__")))
def test_key_and_extension_of_a_name_are_those_of_webdataset(name):
    samples, end = read_shard(tar_bytes([(name, b"x")], encoding="utf-8", errors="surrogateescape"))
    key, extension = base_plus_ext(name)
    if key is None:
        assert end.num_samples == 0
    else:
        assert samples[0].key == key.encode("utf-8", "backslashreplace").decode()
        assert samples[0].members[0].extension == extension
        assert samples[0].members[0].name == name


member_names = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "a/", "b/", "b.c/", "__meta__/"]),
    st.sampled_from(["0", "1", "2 x", "__y__"]),
    st.sampled_from(["jpg", "txt", "JSON", "seg.png", ""]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(member_names, unique_by=str.lower, max_size=10).map(sorted))
def test_a_sorted_shard_is_grouped_as_webdataset_groups_it(member_names):
    data = tar_bytes([(name, name.encode()) for name in member_names])
    theirs = [
        (sample["__key__"], {ext: value for ext, value in sample.items() if not ext.startswith("__")})
        for sample in group_by_keys({**file, "__url__": ""} for file in tar_file_iterator(io.BytesIO(data)))
    ]
    assert plain(read_shard(data)[0]) == theirs


@pytest.mark.parametrize("name", ["A.JPG", "A.Jpg", "dir.with.dots/A.JPEG"])
def test_an_upper_case_extension_is_read_in_lower_case_and_the_name_kept(name):
    [sample], _ = read_shard(tar_bytes([(name, b"x"), (name.partition("A.")[0] + "A.TXT", b"y")]))
    assert [member.extension for member in sample.members] == [name.rpartition(".")[2].lower(), "txt"]
    assert sample.members[0].name == name


@pytest.mark.parametrize(
    "name", ["0000", ".jpg", ".hidden.jpg", "a/.jpg", "a/._0000.jpg", "__meta__", "__meta__/0000.json", "a.b/0000"]
)
def test_names_without_key_or_extension_and_meta_names_are_passed_over(name):
    data = tar_bytes([("0000.jpg", b"image"), (name, b"noise"), ("0000.txt", b"caption")])
    samples, end = read_shard(data)
    assert plain(samples) == [("0000", {"jpg": b"image", "txt": b"caption"})]
    assert end.num_samples == 1


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("target", ["/etc/hostname", "0000.txt", "../../etc/hostname"])
def test_links_devices_and_folders_are_passed_over_and_never_followed(kind, target):
    info = tarfile.TarInfo("0000.jpg")
    info.type, info.linkname = kind, target
    samples, end = read_shard(raw_member(info) + tar_bytes([("0000.txt", b"caption")]))
    assert plain(samples) == [("0000", {"txt": b"caption"})]
    assert not end.torn


@pytest.mark.parametrize("old", [tarfile.AREGTYPE, tarfile.CONTTYPE])
def test_the_other_kinds_of_regular_members_are_read(old):
    info = tarfile.TarInfo("0000.jpg")
    info.type, info.size = old, 5
    samples, _ = read_shard(raw_member(info, b"image") + END)
    assert plain(samples) == [("0000", {"jpg": b"image"})]


PAIR_A, PAIR_B = [("a.jpg", b"1"), ("a.txt", b"2")], [("b.jpg", b"3"), ("b.txt", b"4")]


@pytest.mark.parametrize("between", [[], PAIR_B], ids=["adjacent", "apart"])
def test_a_key_with_two_whole_samples_is_two_samples(between):
    again = [("a.jpg", b"5"), ("a.txt", b"6")]
    samples, end = read_shard(tar_bytes([*PAIR_A, *between, *again]))
    groups = [PAIR_A, *([between] if between else []), again]
    assert [[(member.name, member.data) for member in sample.members] for sample in samples] == groups
    check_accounting(samples, end)


@pytest.mark.parametrize(
    "members",
    [
        [("a.jpg", b""), *PAIR_B, ("a.txt", b"")],
        [("a.txt", b""), *PAIR_B, ("a.jpg", b"")],
        [*PAIR_A, *PAIR_B, ("a.jpg", b"")],
        [("a.jpg", b""), *PAIR_B, *PAIR_A],
        [("a.jpg", b""), ("a.jpg", b""), ("a.txt", b"")],
        [("a.jpg", b""), ("a.txt", b""), ("a.txt", b"")],
        [("a.jpg", b""), ("a.JPG", b""), ("a.txt", b"")],
    ],
    ids=["image first", "caption first", "whole then part", "part then whole", "image twice", "caption twice", "case"],
)
@pytest.mark.parametrize("wanted", [True, False])
def test_a_key_that_comes_back_incomplete_is_an_error_that_names_key_and_cure(members, wanted):
    with pytest.raises(ShardError, match=r"not sorted: members of 'a' .*tar --sort=name"):
        read_shard(tar_bytes([*members, ("z.jpg", b""), ("z.txt", b"")]), wanted=lambda index: wanted)


def test_images_in_one_half_and_captions_in_the_other_are_an_error_and_not_missing_captions():
    members = [(f"{key:03d}.{ext}", b"") for ext in ("jpg", "txt") for key in range(20)]
    with pytest.raises(ShardError, match="'000'"):
        read_shard(tar_bytes(members))


def test_a_json_caption_counts_as_the_caption_of_a_repeated_key():
    members = [("a.jpg", b"1"), ("a.json", b"{}"), *PAIR_B, ("a.jpg", b"2"), ("a.json", b"{}")]
    _, end = read_shard(tar_bytes(members), SampleLayout(caption="json:caption"))
    assert end.num_samples == 3
    with pytest.raises(ShardError, match="not sorted"):
        read_shard(tar_bytes(members))


# --- odd names ---


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
@pytest.mark.parametrize("length", [99, 100, 101, 255, 256, 5000])
def test_long_names_are_read_whole(tar_format, length):
    name = "d/" * 40 + "x" * (length - 84) + ".jpg"
    samples, _ = read_shard(tar_bytes([(name, b"data")], format=FORMATS[tar_format]))
    assert [member.name for member in samples[0].members] == [name]


def test_names_that_are_not_utf8_are_grouped_by_their_bytes_and_escaped_in_the_key():
    odd = [b"\xff\xfe".decode("utf-8", "surrogateescape"), b"\xff\xfd".decode("utf-8", "surrogateescape")]
    members = [(f"{key}.{ext}", f"{number}{ext}".encode()) for number, key in enumerate(odd) for ext in ("jpg", "txt")]
    samples, end = read_shard(tar_bytes(members, format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"))
    assert [sample.key for sample in samples] == ["\\udcff\\udcfe", "\\udcff\\udcfd"]
    assert [(member.name, member.data) for sample in samples for member in sample.members] == members
    assert end.num_samples == 2


def test_pax_names_are_read_as_utf8():
    name = "画像/Ünïcode 🐈.jpg"
    samples, _ = read_shard(tar_bytes([(name, b"")], format=tarfile.PAX_FORMAT))
    assert samples[0].key == "画像/Ünïcode 🐈"


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


@settings(max_examples=150, deadline=None)
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
    assert end == ShardEnd(num_samples=num_whole, torn=True, num_bytes=end_of_last)


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


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=150, deadline=None)
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


@settings(max_examples=200, deadline=None)
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
def test_a_negative_size_ends_the_shard_as_torn_whoever_reads_it(size, extension, wanted, pair_only):
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
@settings(max_examples=60, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(4 * BLOCK, 14 * BLOCK - 1), st.integers(1, 255)), min_size=1, max_size=3))
@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_a_damaged_sparse_map_is_torn_alike_whoever_reads_it(tmp_path_factory, tar_format, flips):
    folder = tmp_path_factory.getbasetemp() / f"sparse-{tar_format}"
    if not folder.exists():
        folder.mkdir()
        sparse_tar(folder, tar_format)
    data, _ = flipped((folder / "s.tar").read_bytes(), flips)
    samples, end = read_shard(data)
    check_accounting(samples, end)
    assert read_shard(data, wanted=lambda index: False)[1] == end


# --- limits and layout ---


@pytest.mark.parametrize("extension", ["jpg", "txt", "npy"])
@pytest.mark.parametrize(("wanted", "pair_only"), [(True, False), (True, True), (False, False)])
def test_only_a_sample_with_a_member_over_the_cap_is_too_large(extension, wanted, pair_only):
    sizes = {"jpg": 1000, "txt": 1000, "npy": 1000}
    large = {**sizes, extension: 1001}
    members = [
        (f"{key}.{ext}", bytes(size))
        for key, all_ in ((1, sizes), (2, large), (3, sizes))
        for ext, size in all_.items()
    ]
    layout = SampleLayout(max_member_bytes=1000)
    samples, end = read_shard(tar_bytes(members), layout, wanted=lambda index: wanted, pair_only=pair_only)
    assert end == ShardEnd(num_samples=3, torn=False, num_bytes=end.num_bytes)
    if wanted:
        assert [sample.problem for sample in samples] == [None, DropReason.MEMBER_TOO_LARGE, None]
        assert [len(sample.members) for sample in samples] == ([2, 0, 2] if pair_only else [3, 0, 3])


def test_a_torn_sample_with_a_member_over_the_cap_is_torn():
    info = tarfile.TarInfo("a.jpg")
    info.size = 5000
    [sample], _ = read_shard(raw_member(info, bytes(2000)), SampleLayout(max_member_bytes=1000))
    assert sample.problem is DropReason.TORN


@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
@pytest.mark.parametrize("cap", [1, 100, 600])
def test_a_cap_on_members_is_no_cap_on_headers(tar_format, cap):
    data = tar_bytes([("long/" * 300 + "a.jpg", b""), ("b.txt", b"b")], format=FORMATS[tar_format])
    samples, end = read_shard(data, SampleLayout(max_member_bytes=cap))
    assert [sample.problem for sample in samples] == [None, None]
    assert not end.torn


@pytest.mark.parametrize("caption", ["", ".", ":caption", "json:", ":"])
def test_a_layout_without_caption_member_or_field_is_refused(caption):
    with pytest.raises(ValueError, match=f"caption is {caption!r}; name a member"):
        SampleLayout(caption=caption)


@pytest.mark.parametrize(
    ("caption", "extension", "field"),
    [
        ("txt", "txt", None),
        (".TXT", "txt", None),
        ("json:caption", "json", "caption"),
        ("json:a:b", "json", "a:b"),
        ("alt.txt", "alt.txt", None),
    ],
)
def test_a_layout_names_the_caption_member_and_its_field(caption, extension, field):
    layout = SampleLayout(caption=caption)
    assert layout.caption_sources == [(extension, field)]
    assert layout.is_pair_member(extension)
    assert layout.is_pair_member("jpg")
    assert not layout.is_pair_member("npy")
