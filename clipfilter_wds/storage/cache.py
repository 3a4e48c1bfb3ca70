"""Keeps copies of remote shards on this machine's disk: ``simplecache::s3://bucket/0.tar``, in fsspec's notation.

fsspec's own caches are not used. When a connection breaks, they keep the short file forever, or (``blockcache``) return
other bytes than the file's, without an error.
"""

import hashlib
import shutil
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from clipfilter_wds.storage.publish import publish
from clipfilter_wds.storage.reader import FileState, RemoteReader
from clipfilter_wds.storage.url import parse_url

_COPY_BYTES = 1 << 20


def open_cached(url: str) -> tuple[BinaryIO, FileState]:
    """Open this machine's copy of a shard, after downloading all of it if there is none.

    A copy belongs to a size and a version (ETag or modification time, as far as the storage tells), which the storage
    is asked for each time. A shard of unknown size is read without a copy.

    Returns:
        The open file, and size and version of its source.

    Raises:
        ValueError: When no folder for copies is configured.
        OSError: When the copy can't be written.
        Exception: As ``RemoteReader`` raises.
    """
    parsed = parse_url(url)
    parsed.check()
    folder, source = _folder(), parsed.source
    reader = RemoteReader(source)
    if reader.state.num_bytes < 0:
        return cast(BinaryIO, reader), reader.state
    with reader:
        path = folder / f"{hashlib.sha256(repr((source, *reader.state)).encode()).hexdigest()}.tar"
        if not (path.is_file() and path.stat().st_size == reader.state.num_bytes):
            _download(reader, path)
        return path.open("rb"), reader.state


def _folder() -> Path:
    folder = fsspec.config.conf.get("simplecache", {}).get("cache_storage")
    if not folder:
        raise ValueError("simplecache:: needs a folder; name it in the variable FSSPEC_SIMPLECACHE_CACHE_STORAGE")
    return Path(folder).expanduser()


def _download(reader: RemoteReader, path: Path) -> None:
    # Several processes may do this at once: each writes a file of its own, and all the files are alike.
    with publish(path) as file:
        shutil.copyfileobj(reader, file, _COPY_BYTES)
        if file.tell() != reader.state.num_bytes:
            raise ConnectionError(f"{file.tell()} of {reader.state.num_bytes} bytes came")
