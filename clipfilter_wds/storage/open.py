"""Opens, sizes and lists files on any storage."""

import os
import re
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from fsspec import AbstractFileSystem

from clipfilter_wds.storage.cache import open_cached
from clipfilter_wds.storage.errors import is_missing, reason, retrying, without_secrets
from clipfilter_wds.storage.filesystem import filesystem, is_local, is_web
from clipfilter_wds.storage.local_glob import local_matches
from clipfilter_wds.storage.reader import FileState, RemoteReader, open_web
from clipfilter_wds.storage.url import parse_url
from clipfilter_wds.types import ShardError

T = TypeVar("T")

_IPV6_HOST = re.compile(r"(?<=://)\[[0-9A-Fa-f:.]*\]")


def open_file(url: str) -> tuple[BinaryIO, FileState]:
    """Open a file for one pass from front to back.

    Returns:
        The open file, and its size and version.

    Raises:
        Exception: The storage's own.
    """
    parsed = parse_url(url)
    if parsed.caches:
        return open_cached(url)
    if (path := parsed.local_path) is not None:
        return _open_local(path)
    reader = RemoteReader(url)
    return cast(BinaryIO, reader), reader.state


def _open_local(path: Path) -> tuple[BinaryIO, FileState]:
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115  # the caller closes it; Path has no opener
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise OSError(f"it is no file but a {_kind_of(status.st_mode)}")
    return file, _state_of(status)


def _state_of(status: os.stat_result) -> FileState:
    return FileState(status.st_size, str(status.st_mtime_ns))


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file; a named pipe too, without waiting for somebody who writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _kind_of(mode: int) -> str:
    return "named pipe" if stat.S_ISFIFO(mode) else "device"


def read_into(raw: BinaryIO, buffer: memoryview) -> int:
    """Fill a buffer with what comes next; the number of bytes read, 0 at the end."""
    if not isinstance(raw, RemoteReader) and hasattr(raw, "readinto"):  # local files can, which saves a copy
        return cast(int, raw.readinto(buffer))
    data = raw.read(len(buffer))
    buffer[: len(data)] = data
    return len(data)


@contextmanager
def open_once(url: str, *, seconds: float) -> Iterator[BinaryIO]:
    """Open a file with a single request, without retries; a web server must deliver all of it within ``seconds``.

    Raises:
        Exception: The storage's own.
    """
    fs, path = filesystem(url)
    with open_web(fs, path, total=seconds) if is_web(fs) else fs.open(path, "rb") as file:
        yield file  # and hold the file system: one of an archive closes the archive when it is freed


def file_state(url: str) -> FileState:
    """Size and version of a file.

    Raises:
        Exception: The storage's own.
    """
    parsed = parse_url(url)
    if not parsed.caches and (path := parsed.local_path) is not None:
        return _state_of(path.stat())
    return FileState.from_info(_info(url))


def exists(url: str) -> bool:
    """Whether a file is there; also where the storage does not tell."""
    try:
        _info(url)
    except Exception as error:  # noqa: BLE001  # each storage has errors of its own
        return not is_missing(error)
    return True


def is_glob(url: str) -> bool:
    """Whether a URL stands for all files that match it. On the web, ``?`` begins a query instead."""
    parsed = parse_url(url)
    place = _IPV6_HOST.sub("", parsed.source)
    return any(char in place for char in ("*[" if parsed.is_web else "*?["))


def list_matches(url: str) -> list[str]:
    """The URLs of all files that a glob matches, sorted.

    Raises:
        ValueError: When the storage can't be listed, or as ``filesystem`` raises.
    """
    parsed = parse_url(url)
    if (path := parsed.local_path) is not None:
        found = local_matches(path)
        return found if parsed.scheme is None else [f"{parsed.scheme}://{name}" for name in found]
    fs, pattern = filesystem(url)
    try:
        names: list[str] = sorted(_ask(fs, lambda: fs.glob(pattern)))
    except Exception as error:  # each storage has errors of its own
        raise ValueError(f"can't list {without_secrets(url)!r}: {reason(error, url)}") from error
    return [parsed.caches + fs.unstrip_protocol(name) for name in names]


def _ask(fs: AbstractFileSystem, request: Callable[[], T]) -> T:
    return request() if is_local(fs) else retrying(request)


def _info(url: str) -> Mapping[str, Any]:
    fs, path = filesystem(url)
    return _ask(fs, lambda: fs.info(path))


# --- pipe: ---


@contextmanager
def open_pipe(url: str) -> Iterator[BinaryIO]:
    """Run the shell command of a ``pipe:`` URL, and read what it writes to its standard output.

    Raises:
        ShardError: When the block ends and the command failed. Being stopped because its output is no longer read is no
            failure.
    """
    with subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE, bufsize=0) as process:  # noqa: S602  # the caller was told to allow it
        yield cast(BinaryIO, process.stdout)
    if process.returncode not in (0, -signal.SIGPIPE, 128 + signal.SIGPIPE):
        raise ShardError(f"the command failed with exit status {process.returncode}")
