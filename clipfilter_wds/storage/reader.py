"""Reads a remote file from front to back, resuming where a connection broke."""

import io
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple, Self, cast

import fsspec

from clipfilter_wds.storage.errors import ChangedError, retrying
from clipfilter_wds.storage.filesystem import filesystem, is_web

_VERSION_KEYS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "last_modified", "mtime", "created")
_SKIPPED_BYTES = 1 << 20


class FileState(NamedTuple):
    """What the storage tells of a file.

    Attributes:
        num_bytes: Its size, -1 when the storage doesn't tell.
        version: What tells it from another file that had or will have its URL: the ETag, or the time of change; None
            when the storage tells neither.
    """

    num_bytes: int = -1
    version: str | None = None

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> Self:
        """From what fsspec tells."""
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), None)
        return cls(-1 if info.get("size") is None else int(info["size"]), version)


class RemoteReader(io.RawIOBase):
    """Reads a remote file once from front to back, and resumes at the right byte when a connection breaks.

    Args:
        url: The file.

    Attributes:
        state: Its size and version.

    Raises:
        Exception: The storage's own, when it can't be reached (retried) or has no such file (not retried).
        ChangedError: From ``read``, when the file was replaced between two connections.
    """

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        self._file: BinaryIO | None = None
        self.state: FileState = retrying(self._look)

    def readable(self) -> bool:
        """Always true."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read up to ``size`` bytes; none only at the end, which never comes before all bytes have."""
        data: bytes = retrying(lambda: self._read(size))
        self._position += len(data)
        return data

    def close(self) -> None:
        """Close the connection."""
        self._disconnect()
        super().close()

    def _look(self) -> FileState:
        fs, path = filesystem(self._url)
        info = fs.info(path)
        if info.get("type") == "directory":  # which would be read as an empty file
            raise IsADirectoryError(f"it is a folder; name its shards: {self._url.rstrip('/')}/*.tar")
        return FileState.from_info(info)

    def _connect(self) -> None:
        fs, path = filesystem(self._url)
        if self._position:
            fs.invalidate_cache()
            if self._look() != self.state:
                raise ChangedError("it changed while it was being read")
        self._fs = fs  # held while the file is open: an archive is closed when its file system is freed
        if is_web(fs):
            # A shard may take hours to read, as slowly as its samples are used, but never a minute without a byte.
            self._file = open_web(fs, path, self._position, self.state.num_bytes, sock_connect=30, sock_read=60)
        else:
            self._file = fs.open(path, "rb")
            self._file.seek(self._position)

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._connect()
            assert self._file is not None
            data: bytes = self._file.read(size)
            if not data and self._position < self.state.num_bytes:
                raise ConnectionError(
                    f"the connection ended after {self._position} of {self.state.num_bytes} bytes; try again"
                )
        except Exception:
            self._disconnect()
            raise
        return data

    def _disconnect(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def open_web(
    fs: fsspec.AbstractFileSystem, path: str, position: int = 0, num_bytes: int = -1, **seconds: float
) -> BinaryIO:
    """Open a web server's file at a position, with a single request: not every server can deliver ranges.

    Args:
        fs: The file system of the web.
        path: The file.
        position: The byte to begin at.
        num_bytes: Size of the whole file, if it is known.
        seconds: Limits, by the names that ``aiohttp.ClientTimeout`` gives them.
    """
    from aiohttp import ClientTimeout  # takes long to import, and shards on this machine don't need it

    headers = {**fs.kwargs.get("headers", {}), **({"Range": f"bytes={position}-"} if position else {})}
    # A stream needs no size, but without one fsspec would send another request for it, which fails on the timeout.
    file: Any = fs.open(
        path, "rb", block_size=0, size=max(num_bytes, 1), headers=headers, timeout=ClientTimeout(**seconds)
    )
    skip = position if file.r.status != 206 else 0
    while skip > 0 and (data := file.read(min(skip, _SKIPPED_BYTES))):
        skip -= len(data)
    if skip:
        file.close()
        raise ConnectionError(f"the connection ended {skip} bytes before byte {position}; try again")
    return cast(BinaryIO, file)
