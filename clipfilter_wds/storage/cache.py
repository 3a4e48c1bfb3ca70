"""Remote shards that are kept on this machine's disk: ``simplecache::s3://bucket/0.tar``, written as fsspec has it.

fsspec's own caches are not used. When a connection breaks, they keep the file as short as it then is for ever, or
(``blockcache``) deliver other bytes than the file's, and don't say so.
"""

import hashlib
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.reader import RemoteReader

_PREFIX = "simplecache::"
_UNSAFE = ("filecache::", "blockcache::", "cached::")
_COPY_BYTES = 1 << 20


def is_cached(url: str) -> bool:
    """Whether a shard is to be kept on this machine."""
    return url.startswith(_PREFIX)


def source_of(url: str) -> str:
    """The URL of the shard itself.

    Raises:
        ValueError: When it is to be kept by a cache that may deliver wrong bytes, or is on this machine already.
    """
    if url.startswith(_UNSAFE):
        raise ValueError(f"{without_secrets(url)!r}: this cache of fsspec's may deliver wrong bytes; use {_PREFIX}")
    source = url.removeprefix(_PREFIX)
    if is_cached(url) and "://" not in source:
        raise ValueError(f"{url!r} is on this machine already; name it without {_PREFIX}")
    return source


def open_cached(url: str) -> tuple[BinaryIO, int]:
    """Open a shard's copy, which is downloaded whole before that, if it is not there; and its size.

    The copy belongs to a size and a version (ETag, or time of change, as far as the storage tells), which it is asked
    for each time. One whose size is not told is read without a copy.

    Raises:
        ValueError: When no folder is named to keep shards in.
        OSError: When the copy can't be written.
        Exception: As ``RemoteReader`` raises.
    """
    folder = _folder()
    reader = RemoteReader(source_of(url))
    if reader.num_bytes < 0:
        return cast(BinaryIO, reader), -1
    with reader:
        name = hashlib.sha256(repr((source_of(url), reader.version)).encode()).hexdigest()
        path = folder / f"{name}.tar"
        if not (path.is_file() and path.stat().st_size == reader.num_bytes):
            folder.mkdir(parents=True, exist_ok=True)
            _download(reader, path)
        return path.open("rb"), reader.num_bytes


def _folder() -> Path:
    folder = fsspec.config.conf.get("simplecache", {}).get("cache_storage")
    if not folder:
        raise ValueError(f"{_PREFIX} needs a folder; name it in the variable FSSPEC_SIMPLECACHE_CACHE_STORAGE")
    return Path(folder).expanduser()


def _download(reader: RemoteReader, path: Path) -> None:
    """Appear whole or not at all. Several at once do no harm: each writes a file of its own, and all are alike."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
        try:
            shutil.copyfileobj(reader, file, _COPY_BYTES)
            if file.tell() != reader.num_bytes:
                raise ConnectionError(f"{file.tell()} of {reader.num_bytes} bytes came")
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(file.name).unlink()
            raise
