"""Opens a shard and unpacks it."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, cast

import zstandard

from clipfilter_wds.storage.errors import reason
from clipfilter_wds.storage.open import file_state, open_file, open_pipe, read_into
from clipfilter_wds.storage.reader import FileState
from clipfilter_wds.types import ShardError, ShardIdentity

_BUFFER_BYTES = 1 << 18
#: A compressed shard that unpacks to more than this many times its size is a bomb. Images hardly shrink at all; gzip's
#: limit is 1,032, Zstandard has none.
_MAX_EXPANSION = 200
_UNCHECKED_BYTES = 1 << 28
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
#: What Zstandard says of a frame that refers to what lies far before; its limit is that of its own command.
_NEEDS_MEMORY = "too much memory"
_SKIPPABLE_MAGIC = b"\x2a\x4d\x18"  # after any byte 0x5?; pzstd begins with such a frame


class DamagedStreamError(Exception):
    """A compressed shard can't be unpacked any further."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenShard:
    """A shard that is being read.

    Attributes:
        url: Where it is.
        stream: Its unpacked bytes.
        identity: Its size and version, as far as the storage tells.
    """

    url: str
    stream: io.BufferedIOBase
    identity: ShardIdentity


@contextmanager
def open_shard(url: str, *, allow_pipe: bool = False) -> Iterator[OpenShard]:
    """Open a shard for one pass from front to back, unpacking gzip and Zstandard by their magic bytes.

    Args:
        url: A path, a URL of any fsspec storage, or ``pipe:COMMAND``.
        allow_pipe: Run the shell command of a ``pipe:`` URL; only ever for input that you trust.

    Raises:
        ShardError: When it can't be opened; and from ``stream`` when reading fails, or the storage delivers fewer bytes
            than it announced.
        DamagedStreamError: From ``stream`` when it can't be unpacked any further.
    """
    with _open_raw(url, allow_pipe) as (raw, state):
        stream = _unpack(_WholeRaw(raw, state.num_bytes, url))
        yield OpenShard(url=url, stream=stream, identity=ShardIdentity(*state))


@contextmanager
def _open_raw(url: str, allow_pipe: bool) -> Iterator[tuple[BinaryIO, FileState]]:
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise ShardError("it would run a shell command; pass allow_pipe=True if you trust it")
        with open_pipe(url) as raw:
            yield raw, FileState()
        return
    try:
        raw, state = open_file(url)
    except Exception as error:  # each storage has errors of its own
        raise ShardError(f"can't open it: {reason(error, url)}") from error
    with raw:
        yield raw, state


def shard_identity(url: str) -> ShardIdentity:
    """Size and version of a shard, as far as the storage tells.

    Raises:
        ShardError: When it can't be reached.
    """
    try:
        return ShardIdentity(*file_state(url))
    except Exception as error:  # each storage has errors of its own
        raise ShardError(f"can't open it: {reason(error, url)}") from error


class _WholeRaw(io.RawIOBase):
    """Passes bytes through, and checks that the storage delivers all that it announced: a lost connection is no end."""

    def __init__(self, raw: BinaryIO, num_bytes: int, url: str) -> None:
        self._raw, self._num_bytes, self._url, self._position = raw, num_bytes, url, 0

    @property
    def num_read(self) -> int:
        """Bytes that have come so far."""
        return self._position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # BufferedReader passes nothing wider
        filled, view = 0, memoryview(buffer)  # of what may be a bytearray, a slice of which would be a copy
        while filled < len(buffer) and (num_bytes := self._read(view[filled:])):
            filled += num_bytes
        return filled

    def _read(self, buffer: memoryview) -> int:
        try:
            num_bytes = read_into(self._raw, buffer)
        except Exception as error:  # each storage has errors of its own
            raise ShardError(f"reading failed at byte {self._position}: {reason(error, self._url)}") from error
        if not num_bytes and self._position < self._num_bytes:
            raise ShardError(f"the connection ended after {self._position} of {self._num_bytes} bytes; try again")
        self._position += num_bytes
        return num_bytes


class _UnpackedRaw(io.RawIOBase):
    """Unpacks a compressed stream, and turns all the errors of damaged ones into one."""

    def __init__(self, stream: io.BufferedIOBase, packed: _WholeRaw) -> None:
        self._stream, self._packed, self._num_bytes = stream, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # as above
        try:
            data = self._stream.read1(len(buffer))  # read would lose what it has when it meets the damage
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            if _NEEDS_MEMORY in str(error) and not self._num_bytes:
                raise ShardError(
                    "unpacking it takes more than 128 MiB of memory, as what was packed by zstd --long=28 or more: "
                    "pack it anew without --long"
                ) from error
            raise DamagedStreamError(str(error)) from error
        self._num_bytes += len(data)
        if not self._num_bytes:
            raise DamagedStreamError("it ends before anything can be unpacked")
        if self._num_bytes > max(_MAX_EXPANSION * self._packed.num_read, _UNCHECKED_BYTES):
            raise ShardError(
                f"{self._packed.num_read} bytes of it unpack to {self._num_bytes}, over {_MAX_EXPANSION} times as many,"
                " as in files that are made to do harm. If you trust it, unpack it first"
            )
        buffer[: len(data)] = data
        return len(data)


def is_compressed(start: bytes) -> bool:
    """Whether a file that begins with these bytes, at least four, is gzip or Zstandard."""
    is_skippable = start[1:4] == _SKIPPABLE_MAGIC and start[0] >> 4 == 5
    return start.startswith((_GZIP_MAGIC, _ZSTD_MAGIC)) or is_skippable


def _unpack(whole: _WholeRaw) -> io.BufferedIOBase:
    raw = io.BufferedReader(whole, buffer_size=_BUFFER_BYTES)
    magic = raw.peek(4)[:4]
    if not is_compressed(magic):
        return raw
    if magic.startswith(_GZIP_MAGIC):
        packed = cast(io.BufferedIOBase, gzip.GzipFile(fileobj=raw))
    else:
        packed = cast(io.BufferedIOBase, zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return io.BufferedReader(_UnpackedRaw(packed, whole), buffer_size=_BUFFER_BYTES)
