"""Reads the members of a tar stream in one pass from front to back."""

import re
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from hashlib import blake2b
from io import BufferedIOBase
from typing import NamedTuple
from zlib import adler32

from clipfilter_wds.shards.archive_end import Behind, look_behind
from clipfilter_wds.shards.forward_reader import BLOCK, END_MARK, MAX_HEADER_BYTES, READ_BYTES, ForwardReader
from clipfilter_wds.shards.open import DamagedStreamError
from clipfilter_wds.types import StoredMember

# What follows the name in nearly all headers: numbers in octal, no prefix. Groups: size, checksum, kind.
_NUMBER = rb"[0-7]{6}[0-7\0 ][\0 ]"
_FIELDS = re.compile(
    3 * _NUMBER
    + rb"([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6}[\0 ]{2})([0x]).{172}"
    + 2 * (rb"(?:" + _NUMBER + rb"|\0{8})")
    + rb"\0.{166}",
    re.DOTALL,
)
# The record after a pax header that holds just a time to fractions of a second. Group: its length.
_TIME = re.compile(rb"(\d\d) [amc]time=[0-9.]+\n")

#: What iterating over a :class:`TarStream`, or reading from it, raises where the archive is damaged.
TAR_DAMAGE = (tarfile.TarError, DamagedStreamError, ValueError, LookupError, OverflowError, RecursionError)

#: Of headers; as many bits as tell all shards apart that there will ever be.
_SIGNATURE_BYTES = 16


class TarEntry(NamedTuple):
    """A regular member of a tar: its name, and its place in the stream.

    Attributes:
        name: The full name; bytes that are not UTF-8 are surrogates.
        size: Bytes of data.
        start: Where its headers begin: a long name or a precise time has a header of its own.
        data: Where its data begins.
        stop: Where the next member begins.
        sparse: What tarfile knows of a member whose holes were left out of the tar, None for other members.
        is_alone: Whether its own headers describe it fully; a tar can also have global ones for all that follow.
    """

    name: str
    size: int
    start: int
    data: int
    stop: int
    sparse: tarfile.TarInfo | None = None
    is_alone: bool = True

    @property
    def is_possible(self) -> bool:
        """Whether as many bytes as it declares fit between its headers and the next member."""
        return self.size >= 0 and (self.sparse is not None or self.data + self.size <= self.stop)


class TarStream:
    """Reads the regular members of a tar once. Links, devices and folders are passed over and never followed.

    Nearly all headers are alike and are parsed here in a few microseconds; tarfile parses the others. Archives that
    were joined, as by ``cat a.tar b.tar``, are read one after another.

    Args:
        stream: The archive, from its beginning.
        max_member_bytes: No larger member is read.
        on_link: Called with the name of each link that is passed over.

    Attributes:
        archive: Number of the archive that the last member lies in, counting from 0.
    """

    def __init__(
        self, stream: BufferedIOBase, max_member_bytes: int, on_link: Callable[[str], None] = lambda name: None
    ) -> None:
        self._reader = ForwardReader(stream)
        self._max_member_bytes = max_member_bytes
        self._on_link = on_link
        self._archive: tarfile.TarFile | None = None
        self.archive = 0
        self._behind = Behind.DAMAGE
        self._time_header, self._time_size = b"", 0
        self._headers = blake2b(digest_size=_SIGNATURE_BYTES)

    def __iter__(self) -> Iterator[TarEntry]:
        """Yield the members in order. Read the data of one before asking for the next.

        Raises:
            tarfile.TarError: Where the archive is damaged; tarfile may raise other errors there too.
            ShardError: When a compressed archive follows one that is not.
        """
        yield from self._read_archive()
        while (behind := look_behind(self._reader)) is Behind.ARCHIVE:
            self.archive += 1
            yield from self._read_archive()
        self._behind = behind

    def _read_archive(self) -> Iterator[TarEntry]:
        reader = self._reader
        reader.seek(reader.tell())
        self._archive = archive = tarfile.TarFile(fileobj=reader, mode="r", errors="surrogateescape")  # type: ignore[arg-type]  # all that reading needs
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every header, which would grow with the shard
            self._headers.update(reader.since_seek)
            if info.isreg():
                yield TarEntry(
                    info.name,
                    info.size,
                    info.offset,
                    info.offset_data,
                    archive.offset,
                    sparse=info if info.issparse() else None,
                    is_alone=not archive.pax_headers,
                )
            elif info.islnk() or info.issym():
                self._on_link(info.name)
            reader.seek(archive.offset)
            while not archive.pax_headers and (entry := self._read_plain()) is not None:
                yield entry
                reader.seek(entry.stop)
                archive.offset = entry.stop

    def _read_plain(self) -> TarEntry | None:
        """The member that begins here, if its headers are of the common form."""
        reader = self._reader
        reader.have(BLOCK)
        if reader.window[reader.at + 156 : reader.at + 157] == b"x":
            reader.have(3 * BLOCK)
            if not self._is_plain_time(reader.window, reader.at):
                return None
            num_header_bytes = 3 * BLOCK
        else:
            num_header_bytes = BLOCK
        start, headers = reader.tell(), reader.window[reader.at : reader.at + num_header_bytes]
        found = _read_header(headers[-BLOCK:])
        if found is None or found[2] != b"0":
            return None
        self._headers.update(headers)
        name, size, _ = found
        data = start + num_header_bytes
        return TarEntry(name.decode("ascii"), size, start, data, data + size + -size % BLOCK)

    def _is_plain_time(self, window: bytes, at: int) -> bool:
        """Whether the pax header at this place holds nothing but a time for the next header."""
        header = window[at : at + BLOCK]
        if header != self._time_header:  # mostly, all members have the same
            found = _read_header(header)
            if found is None:
                return False
            self._time_header, self._time_size = header, found[1]
        at += BLOCK
        time = _TIME.match(window, at)
        if time is None or not time.end() - at == int(time[1]) == self._time_size:
            return False
        return window[time.end() : at + BLOCK] == END_MARK[self._time_size :]

    def read(self, entry: TarEntry, max_bytes: int | None = None) -> bytes:
        """Read the data of the member that was yielded last, or its beginning, where a number of bytes is given.

        Raises:
            tarfile.ReadError: When it is cut, or larger than ``max_member_bytes``.
        """
        size = entry.size if max_bytes is None or entry.sparse is not None else min(entry.size, max_bytes)
        is_large = size > READ_BYTES
        if is_large:
            self._reader.limit = max(self._max_member_bytes, MAX_HEADER_BYTES)
        if entry.sparse is None:
            self._reader.seek(entry.data)
            data = self._reader.read(size)
        else:
            assert self._archive is not None
            data = self._archive.extractfile(entry.sparse).read(size)  # type: ignore[union-attr]  # it is regular
        if is_large:
            self._reader.limit = MAX_HEADER_BYTES
            self._reader.let_go()
        if len(data) < size:
            raise tarfile.ReadError(f"{entry.name!r} is cut")
        return data[:max_bytes]

    def read_stored(self, entry: TarEntry) -> StoredMember:
        """Read the member that was yielded last, with its headers; or a new one, where they need the rest of the tar.

        Raises:
            tarfile.ReadError: As :meth:`read`.
        """
        if entry.sparse is not None or not entry.is_alone:
            return stored_member(entry.name, self.read(entry))
        window, start = self._reader.show(entry.start, entry.stop)
        data = start + entry.data - entry.start
        if data + entry.size > len(window):
            self.read(entry)  # raises, since it is cut
        return StoredMember(entry.name, entry.size, window, start, data, start + entry.stop - entry.start)

    def has_ended(self) -> bool:
        """Whether the last archive ended in its end mark. Call this after the last member.

        A zeroed header in the middle of a shard looks like the end mark, but isn't.
        """
        return self._behind is Behind.NOTHING

    @property
    def signature(self) -> str:
        """A hash of all headers that have come, those of links and folders included."""
        return self._headers.hexdigest()

    @property
    def num_read(self) -> int:
        """How many bytes of the archive have been read."""
        return self._reader.tell()

    @property
    def beginning(self) -> bytes:
        """The first bytes of the archive, for as long as no member has been read."""
        return self._reader.window

    @property
    def failed_at_first_header(self) -> bool:
        """Whether reading stopped at a first block that isn't a header. An empty file has none, and is torn instead."""
        return 0 < self.num_read < BLOCK or (self.num_read == BLOCK and not self._reader.was_short)


def stored_member(name: str, data: bytes) -> StoredMember:
    """A member with a new header that depends on name and size only: time, owner and mode are fixed."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    # The GNU format keeps names of any length and any bytes exactly, but ends them at a NUL.
    has_nul = "\0" in name
    info.pax_headers = {"path": name} if has_nul else {}
    header = info.tobuf(tarfile.PAX_FORMAT if has_nul else tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    window = b"".join((header, data, bytes(-len(data) % BLOCK)))
    return StoredMember(name, len(data), window, 0, len(header), len(window))


def _read_header(header: bytes) -> tuple[bytes, int, bytes] | None:
    """Name, size and kind in a header of the common form, None for another header."""
    fields = _FIELDS.match(header, 100)
    if fields is None:
        return None
    octal, checksum, kind = fields.groups()
    # The sum of 512 ASCII characters is less than 65521, so the lower half of their Adler-32 is that sum plus one.
    if not header.isascii() or adler32(header) & 0xFFFF != _sum_with(checksum):
        return None
    name = header[:100].partition(b"\0")[0]
    return (name, int(octal, 8), kind) if name else None


@lru_cache(maxsize=1 << 14)
def _sum_with(checksum: bytes) -> int:
    """The sum plus one of a header with this checksum, if that is right; a checksum counts itself as spaces."""
    return int(checksum[:6], 8) - 8 * ord(" ") + sum(checksum) + 1
