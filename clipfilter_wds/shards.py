"""Shard URLs: expand them, share them out, open one."""

import gzip
import io
import posixpath
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast
from urllib.parse import urlsplit

import zstandard
from braceexpand import braceexpand
from fsspec import AbstractFileSystem
from webdataset.gopen import gopen

from clipfilter_wds.paths import folder_identity
from clipfilter_wds.remote import RemoteReader, filesystem, is_local, protocols, reason, retrying, without_secrets
from clipfilter_wds.shard_cache import is_cached, open_cached, source_of
from clipfilter_wds.types import ShardError

_TAR_SUFFIX = re.compile(r"\.(tar|tgz|tzst|tar\.(gz|zst|zstd))$", re.IGNORECASE)
_BUFFER_BYTES = 1 << 18
#: A compressed shard that unpacks to more than this many times its size is a bomb. Images hardly shrink at all; gzip's
#: limit is 1,032, Zstandard has none.
_MAX_EXPANSION = 200
_UNCHECKED_BYTES = 1 << 28
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC = b"\x2a\x4d\x18"  # behind any byte 0x5?; pzstd begins with such a frame


class DamagedStreamError(Exception):
    """A compressed shard that can't be unpacked any further."""


# --- from what the user wrote to a list of URLs ---


def expand_shards(shards: str | Path | Sequence[str | Path], *, allow_pipe: bool = False) -> list[str]:
    """Every shard that ``shards`` names, each once, in the order given (the matches of a glob sorted).

    Args:
        shards: A path or URL, a glob, a brace range (``{00000..00999}``), several of these separated by commas,
            ``@file.txt`` with one of these per line, or a list of any of these.
        allow_pipe: Let ``pipe:`` URLs through. They run a shell command, so only ever for input that you trust.

    Raises:
        ValueError: When nothing matches, a folder is named, or a ``pipe:`` URL is not allowed.
    """
    patterns = [shards] if isinstance(shards, (str, Path)) else list(shards)
    if not patterns:
        raise ValueError("no shard matches an empty list")
    urls: dict[str, str] = {}
    for pattern in map(str, patterns):
        found = _expand_one(pattern, allow_pipe)
        if not found:
            raise ValueError(f"no shard matches {without_secrets(pattern)!r}")
        urls.update({_identity(url): url for url in found if _identity(url) not in urls})
    return list(urls.values())


def _identity(url: str) -> str:
    """What two ways to write one local path have in common."""
    return url if "://" in url or url.startswith("pipe:") else str(Path(url).expanduser().resolve())


def _expand_one(pattern: str, allow_pipe: bool) -> list[str]:
    if pattern.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(f"{pattern!r} would run a shell command; pass allow_pipe=True if you trust it")
        return [pattern]
    if "://" not in pattern and Path(pattern).is_file():
        return [pattern]  # a file is meant as it is written, even with a comma or bracket in its name
    if pattern.startswith("@"):
        return [url for line in _lines(Path(pattern[1:])) for url in _expand_one(line, allow_pipe)]
    parts = [part.strip() for part in _split_at_commas(pattern)]
    if len(parts) > 1:
        return [url for part in parts if part for url in _expand_one(part, allow_pipe)]
    try:
        candidates = list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"{without_secrets(pattern)!r} is not a brace range like {{00000..00999}}: {error}") from None
    return [url for candidate in candidates for url in _matches(candidate)]


def _split_at_commas(pattern: str) -> list[str]:
    """The parts between commas that stand in no braces."""
    parts, depth = [""], 0
    for char in pattern:
        depth += (char == "{") - (char == "}")
        if char == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"can't read the list of shards {str(path)!r}: {error.strerror}") from None
    return [line for line in lines if line and not line.startswith("#")]


def _matches(url: str) -> list[str]:
    source = source_of(url)
    fs, path = filesystem(source)
    local = is_local(fs)
    if any(char in path for char in ("*[" if "http" in protocols(fs) else "*?[")):  # the web's ? begins a query
        found = sorted(_glob(url, fs, path))
        if not found:
            raise ValueError(f"no shard matches {without_secrets(url)!r}")
        return (
            found
            if local and "://" not in url
            else [url.removesuffix(source) + fs.unstrip_protocol(name) for name in found]
        )
    if local and Path(path).is_dir():
        raise ValueError(f"{url!r} is a folder; name its shards, for example {url.rstrip('/') + '/*.tar'!r}")
    if local and not Path(path).exists():
        raise ValueError(f"no shard matches {url!r}: there is no such file")
    return [url]


def _glob(url: str, fs: AbstractFileSystem, path: str) -> list[str]:
    try:
        found: list[str] = fs.glob(path) if is_local(fs) else retrying(lambda: fs.glob(path))
    except Exception as error:  # each storage has errors of its own
        raise ValueError(f"can't list {without_secrets(url)!r}: {reason(error, url)}") from error
    return found


# --- from a URL to names ---


def shard_name(url: str) -> str:
    """The shard's base name without folder, query and tar suffix: ``s3://b/x/00000.tar.gz?v=1`` is ``00000``."""
    base = posixpath.basename(_path_of(url))
    name = _TAR_SUFFIX.sub("", base)
    if name in ("", ".", "..") or "\0" in name or "\\" in name:
        raise ValueError(f"{without_secrets(url)!r} has no base name that an output file could have")
    return name


def shard_path(url: str) -> str:
    """The absolute path of a shard without tar suffix: ``s3://b/x/00000.tar.gz?v=1`` is ``/b/x/00000``."""
    return posixpath.join(_folder_of(url), shard_name(url))


def output_names(urls: Sequence[str]) -> dict[str, str]:
    """A relative output name (no suffix) per URL, no two alike.

    Base names where those differ; where some are alike, every shard keeps its folders below the common parent.

    Raises:
        ValueError: When two shards would still get one name (``00000.tar`` beside ``00000.tar.gz``).
    """
    names = {url: shard_name(url) for url in urls}
    if len(set(names.values())) < len(urls):
        folders = {url: _folder_of(url) for url in urls}
        common = posixpath.commonpath(list(folders.values())) if urls else ""
        names = {url: posixpath.join(posixpath.relpath(folders[url], common), names[url]) for url in urls}
        names = {url: posixpath.normpath(name) for url, name in names.items()}
    taken: dict[str, str] = {}
    for url, name in names.items():
        if name in taken:
            raise ValueError(
                f"{without_secrets(taken[name])!r} and {without_secrets(url)!r} would both be written to "
                f"{name + '.tar'!r}; rename one of them"
            )
        taken[name] = url
    return names


def public_url(url: str) -> str:
    """The absolute URL of a shard without what may be secret in it: user, password, query."""
    if url.startswith("pipe:"):
        return f"{url.split()[0]} …" if " " in url else url  # a command's arguments may hold anything
    if "://" not in url:
        return _identity(url)
    parts = urlsplit(url.rpartition("::")[2])
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path if parts.scheme and "://" in url else url


def _folder_of(url: str) -> str:
    folder = posixpath.dirname(_path_of(url))
    absolute = folder if "://" in url else str(Path(folder).resolve())
    return posixpath.normpath("/" + absolute.lstrip("/"))


def shard_folder(url: str) -> str:
    """The folder that holds a shard, as :func:`~clipfilter_wds.remote.folder_identity` tells folders apart."""
    fs, path = filesystem(source_of(url))
    return folder_identity(Path(path).parent) if is_local(fs) else posixpath.dirname(public_url(url))


# --- who reads what ---


class ShardPart(NamedTuple):
    """One worker's share of a shard: every ``num_parts``-th block of samples, starting with block ``part``."""

    url: str
    part: int = 0
    num_parts: int = 1


def split_by_worker(urls: Sequence[str], worker: int, num_workers: int) -> list[ShardPart]:
    """What ``worker`` of ``num_workers`` reads, so that all of them have work and every block is read exactly once.

    Whole shards in turn; the shards that are left when there are fewer than workers are each shared by several.
    """
    num_whole = len(urls) - len(urls) % num_workers
    parts = [ShardPart(url) for url in urls[worker:num_whole:num_workers]]
    if rest := urls[num_whole:]:
        sharers = range(worker % len(rest), num_workers, len(rest))
        parts.append(ShardPart(rest[worker % len(rest)], sharers.index(worker), len(sharers)))
    return parts


# --- opening one ---


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenShard:
    """A shard that is being read: its unpacked bytes, and its size as stored (-1: the storage does not tell)."""

    url: str
    stream: io.BufferedIOBase
    num_bytes: int


@contextmanager
def open_shard(url: str, *, allow_pipe: bool = False) -> Iterator[OpenShard]:
    """Open a shard for one pass from front to back, unpacking gzip and Zstandard by their magic bytes.

    Raises:
        ShardError: When it can't be opened, and from ``stream`` when reading fails or the storage delivers fewer bytes
            than it announced.
    """
    with _open_raw(url, allow_pipe) as (raw, num_bytes):
        yield OpenShard(url=url, stream=_unpack(_WholeRaw(raw, num_bytes, url)), num_bytes=num_bytes)


@contextmanager
def _open_raw(url: str, allow_pipe: bool) -> Iterator[tuple[BinaryIO, int]]:
    if url.startswith("pipe:"):
        if not allow_pipe:
            raise ShardError("it would run a shell command; pass allow_pipe=True if you trust it")
        yield from _open_pipe(url)
        return
    try:
        raw, num_bytes = _connect(url)
    except Exception as error:  # each storage has errors of its own
        raise ShardError(f"can't open it: {reason(error, url)}") from error
    with raw:
        yield raw, num_bytes


def _connect(url: str) -> tuple[BinaryIO, int]:
    if is_cached(url):
        return open_cached(url)
    fs, path = filesystem(source_of(url))
    if is_local(fs):
        return fs.open(path, "rb"), fs.size(path)
    reader = RemoteReader(url)
    return cast(BinaryIO, reader), reader.num_bytes


def _open_pipe(url: str) -> Iterator[tuple[BinaryIO, int]]:
    raw = gopen(url)
    failed = True
    try:
        yield raw, -1
        failed = False
    finally:
        try:
            raw.close()
        except OSError as error:  # the command's exit status; no news when reading has failed already
            if not failed:
                raise ShardError(f"the command failed: {error}") from error


def shard_num_bytes(url: str) -> int:
    """Size of a shard as stored, -1 when the storage does not tell.

    Raises:
        ShardError: When it can't be reached.
    """
    try:
        fs, path = filesystem(source_of(url))
        num_bytes = fs.size(path) if is_local(fs) else retrying(lambda: fs.size(path))
    except Exception as error:  # each storage has errors of its own
        raise ShardError(f"can't open it: {reason(error, url)}") from error
    return -1 if num_bytes is None else int(num_bytes)


class _WholeRaw(io.RawIOBase):
    """Passes bytes through and checks that the storage delivers all that it announced: a lost connection is no end."""

    def __init__(self, raw: BinaryIO, num_bytes: int, url: str) -> None:
        self._raw, self._num_bytes, self._url, self._position = raw, num_bytes, url, 0

    @property
    def num_read(self) -> int:
        """Bytes that have come so far."""
        return self._position

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # BufferedReader passes nothing wider
        filled, view = 0, memoryview(buffer)  # of what may be a bytearray, of which a slice would be a copy
        while filled < len(buffer) and (num_bytes := self._read(view[filled:])):
            filled += num_bytes
        return filled

    def _read(self, buffer: memoryview) -> int:
        try:
            num_bytes = _read_into(self._raw, buffer)
        except Exception as error:  # each storage has errors of its own
            raise ShardError(f"reading failed at byte {self._position}: {reason(error, self._url)}") from error
        if not num_bytes and self._position < self._num_bytes:
            raise ShardError(f"the connection ended after {self._position} of {self._num_bytes} bytes; try again")
        self._position += num_bytes
        return num_bytes


def _read_into(raw: BinaryIO, buffer: memoryview) -> int:
    if not isinstance(raw, RemoteReader) and hasattr(raw, "readinto"):  # a local file's, which saves a copy
        return cast(int, raw.readinto(buffer))
    data = raw.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


class _UnpackedRaw(io.RawIOBase):
    """Unpacks a compressed stream and gives its many ways to be damaged one name."""

    def __init__(self, stream: io.BufferedIOBase, packed: _WholeRaw) -> None:
        self._stream, self._packed, self._num_bytes = stream, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # as above
        try:
            data = self._stream.read1(len(buffer))  # read would throw away what it has when it meets the damage
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
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


def _unpack(whole: _WholeRaw) -> io.BufferedIOBase:
    raw = io.BufferedReader(whole, buffer_size=_BUFFER_BYTES)
    magic = raw.peek(4)[:4]
    if magic.startswith(_GZIP_MAGIC):
        packed = cast(io.BufferedIOBase, gzip.GzipFile(fileobj=raw))
    elif magic == _ZSTD_MAGIC or (magic[1:] == _SKIPPABLE_MAGIC and magic[0] >> 4 == 5):
        packed = cast(io.BufferedIOBase, zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    else:
        return raw
    return io.BufferedReader(_UnpackedRaw(packed, whole), buffer_size=_BUFFER_BYTES)
