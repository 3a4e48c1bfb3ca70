"""Reads the members of a tar stream in one pass from front to back."""

import re
import tarfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BufferedIOBase
from typing import NamedTuple
from zlib import adler32

from clipfilter_wds.types import StoredMember

_BLOCK = tarfile.BLOCKSIZE
_END_MARK = bytes(_BLOCK)
_READ_BYTES = 1 << 18
#: What headers hold beside 512 bytes (a long name, times, holes) is no longer.
_MAX_HEADER_BYTES = 1 << 20

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

    Nearly all headers are alike and are parsed here in a few microseconds; tarfile parses the others.

    Args:
        stream: The archive, from its beginning.
        max_member_bytes: No larger member is read.
        on_link: Called with the name of each link that is passed over.
    """

    def __init__(
        self, stream: BufferedIOBase, max_member_bytes: int, on_link: Callable[[str], None] = lambda name: None
    ) -> None:
        self._reader = _ForwardReader(stream)
        self._max_member_bytes = max_member_bytes
        self._on_link = on_link
        self._archive: tarfile.TarFile | None = None
        self._time_header, self._time_size = b"", 0

    def __iter__(self) -> Iterator[TarEntry]:
        """Yield the members in order. Read the data of one before asking for the next.

        Raises:
            tarfile.TarError: Where the archive is damaged; tarfile may raise other errors there too.
        """
        reader = self._reader
        self._archive = archive = tarfile.TarFile(fileobj=reader, mode="r", errors="surrogateescape")  # type: ignore[arg-type]  # all that reading needs
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # tarfile remembers every header, which would grow with the shard
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
        reader.have(_BLOCK)
        if reader.window[reader.at + 156 : reader.at + 157] == b"x":
            reader.have(3 * _BLOCK)
            if not self._is_plain_time(reader.window, reader.at):
                return None
            num_header_bytes = 3 * _BLOCK
        else:
            num_header_bytes = _BLOCK
        start, at = reader.tell(), reader.at + num_header_bytes
        found = _read_header(reader.window[at - _BLOCK : at])
        if found is None or found[2] != b"0":
            return None
        name, size, _ = found
        data = start + num_header_bytes
        return TarEntry(name.decode("ascii"), size, start, data, data + size + -size % _BLOCK)

    def _is_plain_time(self, window: bytes, at: int) -> bool:
        """Whether the pax header at this place holds nothing but a time for the next header."""
        header = window[at : at + _BLOCK]
        if header != self._time_header:  # mostly, all members have the same
            found = _read_header(header)
            if found is None:
                return False
            self._time_header, self._time_size = header, found[1]
        at += _BLOCK
        time = _TIME.match(window, at)
        if time is None or not time.end() - at == int(time[1]) == self._time_size:
            return False
        return window[time.end() : at + _BLOCK] == _END_MARK[self._time_size :]

    def read(self, entry: TarEntry, max_bytes: int | None = None) -> bytes:
        """Read the data of the member that was yielded last, or its beginning, where a number of bytes is given.

        Raises:
            tarfile.ReadError: When it is cut, or larger than ``max_member_bytes``.
        """
        size = entry.size if max_bytes is None or entry.sparse is not None else min(entry.size, max_bytes)
        is_large = size > _READ_BYTES
        if is_large:
            self._reader.limit = max(self._max_member_bytes, _MAX_HEADER_BYTES)
        if entry.sparse is None:
            self._reader.seek(entry.data)
            data = self._reader.read(size)
        else:
            assert self._archive is not None
            data = self._archive.extractfile(entry.sparse).read(size)  # type: ignore[union-attr]  # it is regular
        if is_large:
            self._reader.limit = _MAX_HEADER_BYTES
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
        """Whether the last thing read is the end mark, and only padding follows. Call this after the last member.

        A zeroed header in the middle of a shard looks like the end mark, but isn't.
        """
        return self._reader.at_end_mark and self._reader.only_zeros_follow()

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
        return 0 < self.num_read < _BLOCK or (self.num_read == _BLOCK and not self._reader.was_short)


def stored_member(name: str, data: bytes) -> StoredMember:
    """A member with a new header that depends on name and size only: time, owner and mode are fixed."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    # The GNU format keeps names of any length and any bytes exactly, but ends them at a NUL.
    has_nul = "\0" in name
    info.pax_headers = {"path": name} if has_nul else {}
    header = info.tobuf(tarfile.PAX_FORMAT if has_nul else tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    window = b"".join((header, data, bytes(-len(data) % _BLOCK)))
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


class _ForwardReader:
    """The methods of a file that tarfile needs, on a stream that can't seek back.

    Keeps what was read since the last seek, so that headers can be read once more.
    """

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream, self.limit = stream, _MAX_HEADER_BYTES
        # A part of the stream, its position in the stream, and positions within it.
        self.window, self._base, self._held, self.at = b"", 0, 0, 0
        self.at_end_mark = self.was_short = False

    def tell(self) -> int:
        return self._base + self.at

    def seek(self, position: int) -> None:
        """Skip forward to a position, or to the end of the stream if that comes first."""
        at = position - self._base
        if self.at <= at <= len(self.window):
            self.at = self._held = at
            return
        if at < self.at:
            raise tarfile.ReadError("a member has a negative size")
        while at > len(self.window) and (piece := self._stream.read1(_READ_BYTES)):
            at -= len(self.window)
            self._base += len(self.window)
            self.window = piece
        self.at = self._held = min(at, len(self.window))

    def show(self, start: int, stop: int) -> tuple[bytes, int]:
        """A window that holds the stream between two positions, and where in it the first is. Does not move.

        The first position must not lie before the last seek. The window is shorter where the stream ends earlier.
        """
        self.have(stop - self.tell())
        return self.window, start - self._base

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.limit - (self.at - self._held):
            raise tarfile.ReadError(f"a header declares {size} bytes")
        self.have(size)
        data = self.window[self.at : self.at + size]
        self.at += len(data)
        self.was_short = len(data) < size
        self.at_end_mark = data == _END_MARK
        return data

    def only_zeros_follow(self) -> bool:
        piece = self.window[self.at :]
        while not piece.rstrip(b"\0"):
            piece = self._stream.read1(_READ_BYTES)
            if not piece:
                return True
        return False

    def have(self, size: int) -> None:
        """Fill the window with this many bytes from here on, or with the rest of the stream. Does not move."""
        if self.at + size <= len(self.window):
            return
        # A header may declare far more bytes than there are, so memory is allocated only for what arrives.
        size -= len(self.window) - self.at
        self._forget(self._held)
        pieces = [self.window]
        while size > 0 and (piece := self._stream.read1(_READ_BYTES)):
            pieces.append(piece)
            size -= len(piece)
        self.window = b"".join(pieces)

    def let_go(self) -> None:
        """Keep nothing of what was read."""
        self._forget(self.at)

    def _forget(self, num_bytes: int) -> None:
        self._base += num_bytes
        self.at -= num_bytes
        self._held = 0
        self.window = self.window[num_bytes:]
