"""Names files and folders that a run writes, on this machine or on any storage that fsspec knows."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, TypeVar

from fsspec import AbstractFileSystem

from clipfilter_wds.storage.errors import reason, retrying, without_secrets
from clipfilter_wds.storage.filesystem import filesystem, is_web
from clipfilter_wds.storage.url import parse_url, real_path

T = TypeVar("T")


@dataclass(frozen=True)
class RemotePath:
    """A file or folder on remote storage, with the part of :class:`pathlib.Path` that a run needs.

    Can be pickled, and used in threads and forked processes. Every request is retried while its error may pass.

    Raises:
        OSError: From every method, when the storage fails; without the URL's secrets.
    """

    url: str

    def __str__(self) -> str:
        return without_secrets(self.url)

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """The folder that holds it."""
        return RemotePath(self.url.rpartition("/")[0])

    def is_file(self) -> bool:
        """Whether the file is there."""
        return self.num_bytes() is not None

    def num_bytes(self) -> int | None:
        """Size of the file in bytes, None when it isn't there."""

        def ask(fs: AbstractFileSystem, path: str) -> int | None:
            try:
                return int(fs.size(path))
            except FileNotFoundError:
                return None

        return self._request("look for", ask)

    def read_bytes(self) -> bytes:
        """The file's content."""
        return self._request("read", lambda fs, path: bytes(fs.cat_file(path)))

    def upload(self, file: IO[bytes]) -> None:
        """Store the whole of an open local file here. Nothing of it can be seen before it is whole."""

        def send(fs: AbstractFileSystem, path: str) -> None:
            num_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            fs.put_file(f"/dev/fd/{file.fileno()}", path)
            if (stored := fs.size(path)) != num_bytes:
                raise OSError(f"{stored} of {num_bytes} bytes were stored")

        self._request("write", send)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file."""

        def delete(fs: AbstractFileSystem, path: str) -> None:
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                if not missing_ok:
                    raise

        self._request("delete", delete)

    def rglob(self, pattern: str) -> Iterator["RemotePath"]:
        """Yield the files in this folder and below whose name matches."""

        def find(fs: AbstractFileSystem, path: str) -> list[str]:
            try:
                return [name[len(path) :] for name in fs.find(path)]
            except FileNotFoundError:
                return []

        for name in self._request("list", find):
            if fnmatchcase(name.rpartition("/")[2], pattern):
                yield self / name.removeprefix("/")

    def _request(self, what: str, request: Callable[[AbstractFileSystem, str], T]) -> T:
        # Looked up each time, since a parent's file system doesn't work in a forked process; fsspec caches them.
        # What other processes write must be seen at once, so listings are not cached.
        fs, path = filesystem(self.url, use_listings_cache=False)
        try:
            return retrying(lambda: request(fs, path))
        except Exception as error:  # each storage has errors of its own
            raise OSError(f"can't {what} {str(self)!r}: {reason(error, self.url)}") from error


AnyPath = Path | RemotePath


def any_path(url: str | Path) -> AnyPath:
    """A path or URL as a place to write to.

    Raises:
        ValueError: When it is empty or on the web, which can't be written to; when its first folder has no name, which
            s3fs can't list; or as ``filesystem`` raises.
    """
    if not str(url).strip():  # an empty text would be the current folder
        raise ValueError("output is empty; it must be a path")
    fs, path = filesystem(str(url))
    if (local := parse_url(str(url)).local_path) is not None:
        return local
    if is_web(fs):
        raise ValueError(f"{without_secrets(str(url))!r} can be read but not written to")
    if re.match("[^/]+//", path.rstrip("/")):
        raise ValueError(f"{without_secrets(str(url))!r} has an empty folder name; write one slash behind the bucket")
    return RemotePath(str(url).rstrip("/"))


def folder_identity(folder: AnyPath) -> str:
    """A text that is the same for all ways to write one folder."""
    return real_path(folder) if isinstance(folder, Path) else str(folder)


def num_bytes_of(path: AnyPath) -> int | None:
    """Size of a file in bytes, None when it isn't there."""
    if isinstance(path, RemotePath):
        return path.num_bytes()
    return path.stat().st_size if path.is_file() else None
