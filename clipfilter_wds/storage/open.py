"""Opens, sizes and lists files of any storage."""

from typing import BinaryIO, cast

from fsspec import AbstractFileSystem

from clipfilter_wds.storage.cache import is_cached, open_cached, source_of
from clipfilter_wds.storage.errors import reason, retrying, without_secrets
from clipfilter_wds.storage.filesystem import filesystem, is_local
from clipfilter_wds.storage.reader import RemoteReader


def list_matches(url: str, fs: AbstractFileSystem, path: str) -> list[str]:
    """The files that a glob matches, as the file system names them.

    Raises:
        ValueError: When the storage can't be listed.
    """
    try:
        found: list[str] = fs.glob(path) if is_local(fs) else retrying(lambda: fs.glob(path))
    except Exception as error:  # each storage has errors of its own
        raise ValueError(f"can't list {without_secrets(url)!r}: {reason(error, url)}") from error
    return found


def open_file(url: str) -> tuple[BinaryIO, int]:
    """A file opened for one pass from front to back, and its size, -1 when the storage does not tell."""
    if is_cached(url):
        return open_cached(url)
    fs, path = filesystem(source_of(url))
    if is_local(fs):
        return fs.open(path, "rb"), fs.size(path)
    reader = RemoteReader(url)
    return cast(BinaryIO, reader), reader.num_bytes


def read_into(raw: BinaryIO, buffer: memoryview) -> int:
    """Fills a buffer with what comes next, and returns how many bytes that was; 0 at the end."""
    if not isinstance(raw, RemoteReader) and hasattr(raw, "readinto"):  # a local file's, which saves a copy
        return cast(int, raw.readinto(buffer))
    data = raw.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)
