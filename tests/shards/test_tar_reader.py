"""Plain headers are read without tarfile: they must say what tarfile finds in them."""

import io
import itertools
import tarfile

import hypothesis.strategies as st
import pytest
import webdataset
from hypothesis import given, settings

from clipfilter_wds.shards.open import _WholeRaw
from clipfilter_wds.shards.tar_reader import TarEntry, TarStream, stored_member
from tests.support.toys import raw_member

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


class Careful(TarStream):
    """Leaves every header to tarfile."""

    def _read_plain(self) -> None:
        return None


def found_in(data: bytes, reader: type[TarStream], *, read: bool) -> tuple[list[TarEntry], list[bytes], object]:
    """All that a reader finds: members, their bytes, and how it ended."""
    tar = reader(io.BytesIO(data), 1 << 20)
    entries, contents = [], []
    try:
        for entry in tar:
            entries.append(entry._replace(sparse=entry.sparse is not None))
            if read and entry.is_possible:
                contents.append(tar.read(entry))
        return entries, contents, tar.has_ended()
    except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError) as error:
        return entries, contents, (type(error), str(error), tar.failed_at_first_header)


def num_left_to_tarfile(data: bytes, monkeypatch) -> int:
    calls = []
    real = tarfile.TarInfo.fromtarfile.__func__
    monkeypatch.setattr(
        tarfile.TarInfo, "fromtarfile", classmethod(lambda cls, tar: [calls.append(1), real(cls, tar)][1])
    )
    list(TarStream(io.BytesIO(data), 1 << 20))
    return len(calls)


names = st.text(st.sampled_from("ab/._ é\udcff"), min_size=1, max_size=20) | st.just("d/" * 60 + "x.jpg")
infos = st.builds(
    dict,
    name=names,
    mode=st.integers(0, 0o7777),
    uid=st.sampled_from([0, 1000, 0o7777777, 0o10000000]),
    mtime=st.sampled_from([0, 1.5, 1_700_000_000.123, 1e10, -1, -0.5]),
    uname=st.sampled_from(["", "bigdata", "ü"]),
    type=st.sampled_from(
        [tarfile.REGTYPE] * 5 + [tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE]
    ),
    pax_headers=st.sampled_from([{}, {}, {"comment": "x"}, {"mtime": "1.2.3"}, {"path": "other.jpg"}, {"size": "7"}]),
)
members = st.lists(st.tuples(infos, st.binary(max_size=1200), st.sampled_from(FORMATS)), max_size=4)


def tar_of(members) -> bytes:
    pieces = []
    for fields, data, tar_format in members:
        info = tarfile.TarInfo()
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        try:
            pieces.append(raw_member(info, data, tar_format))
        except ValueError:  # this format can't hold it
            pieces.append(raw_member(tarfile.TarInfo("a.txt")))
    return b"".join(pieces)


@settings(max_examples=300)
@given(members, st.booleans())
def test_members_of_any_format_are_found_as_tarfile_finds_them(members, read):
    data = tar_of(members) + END
    assert found_in(data, TarStream, read=read) == found_in(data, Careful, read=read)


@settings(max_examples=500)
@given(
    members.filter(bool),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_damaged_headers_are_taken_as_tarfile_takes_them(members, changes, mend, read):
    """Also where the checksum is right again, as it is when the one who wrote the header meant it."""
    data = bytearray(tar_of(members))
    for at, value in changes:
        at %= len(data)
        data[at] = value
        header = at - at % BLOCK
        if mend:
            checksum = sum(data[header : header + BLOCK]) - sum(data[header + 148 : header + 156]) + 8 * 32
            data[header + 148 : header + 156] = b"%06o\0 " % checksum
    data += END
    assert found_in(data, TarStream, read=read) == found_in(data, Careful, read=read)


def webdataset_tar() -> bytes:
    file = io.BytesIO()
    with webdataset.TarWriter(file) as tar:
        for key in range(50):
            tar.write({"__key__": f"{key:04d}", "jpg": b"j" * 300 * key, "txt": b"t"})
    return file.getvalue()


def test_headers_of_webdataset_and_of_tarfile_are_plain(monkeypatch):
    """They are what nearly all shards have; the first one, and the end, are always tarfile's."""
    num_of_first = 2  # one of a time
    assert num_left_to_tarfile(webdataset_tar(), monkeypatch) == num_of_first + 1
    for tar_format in FORMATS:
        data = b"".join(raw_member(tarfile.TarInfo(f"{key}.jpg"), tar_format=tar_format) for key in range(50))
        assert num_left_to_tarfile(data + END, monkeypatch) == 2


@settings(max_examples=200)
@given(members.filter(bool))
def test_a_stored_member_is_the_same_member_in_another_tar(members):
    global_header = tarfile.TarInfo.create_pax_global_header({"mtime": "7"})
    for front in (b"", global_header):
        tar = TarStream(io.BytesIO(front + tar_of(members) + END), 1 << 20)
        for entry in tar:
            if not entry.is_possible:
                break
            stored = tar.read_stored(entry)
            alone = TarStream(io.BytesIO(stored.window[stored.start : stored.stop] + END), 1 << 20)
            [(name, data)] = [(found.name, alone.read(found)) for found in alone]
            assert (name, data) == (entry.name, stored.window[stored.data : stored.data + stored.size])
            assert len(data) == entry.size


def test_members_that_follow_each_other_lie_in_one_window_and_are_their_bytes_in_the_tar():
    data = webdataset_tar()
    tar = TarStream(io.BytesIO(data), 1 << 20)
    stored = [tar.read_stored(entry) for entry in tar]
    assert data.startswith(b"".join(member.window[member.start : member.stop] for member in stored))
    assert len({id(member.window) for member in stored}) <= 3


@pytest.mark.parametrize("name", ["a.jpg", "x" * 3000 + ".jpg", "a\0b.jpg"])
def test_a_header_that_is_made_has_no_time_or_owner(name):
    stored = stored_member(name, b"data")
    with tarfile.open(fileobj=io.BytesIO(stored.window + END)) as tar:
        [info] = tar
    assert (info.name, info.size, info.mtime, info.uid, info.gid, info.mode) == (name, 4, 0, 0, 0, 0o644)


class Dribble(io.RawIOBase):
    """A connection: it delivers what has come so far, which is seldom all that was asked for."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._stream, self._sizes = io.BytesIO(data), itertools.cycle(sizes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._stream.readinto(memoryview(buffer)[: next(self._sizes)])


@settings(max_examples=100)
@given(
    members, st.lists(st.integers(1, 2000), min_size=1, max_size=5), st.sampled_from([1, 100, 512, 1 << 18]), st.data()
)
def test_a_stream_of_short_reads_holds_the_same_members(members, sizes, buffer_size, data):
    whole = tar_of(members) + END
    whole = whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))]
    dribble = _WholeRaw(Dribble(whole, sizes), len(whole), "a.tar")
    assert stored_in(io.BufferedReader(dribble, buffer_size)) == stored_in(io.BytesIO(whole))
    dribble = io.BufferedReader(Dribble(whole, sizes), buffer_size)  # each refill of the window is short as well
    assert stored_in(dribble) == stored_in(io.BytesIO(whole))


def stored_in(stream: io.BufferedIOBase) -> tuple[list[bytes], object]:
    """The members as they stand in a tar, and how it ended."""
    tar, found = TarStream(stream, 1 << 20), []
    try:
        for entry in tar:
            stored = tar.read_stored(entry)
            found.append(stored.window[stored.start : stored.stop])
        return found, tar.has_ended()
    except (tarfile.TarError, ValueError, LookupError, OverflowError, RecursionError) as error:
        return found, (type(error), str(error), tar.failed_at_first_header)
