"""Storage on other machines, through fsspec: find it, try again when it fails, read on where a connection broke."""

import io
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.registry import registry

T = TypeVar("T")

#: Pauses before the second, third, ... attempt; each is varied by half, so that many readers don't come back at once.
RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)

_EXTRA_OF_PROTOCOL = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError)
_PERMANENT_NAMES = {"NoCredentialsError", "PartialCredentialsError", "NotImplementedError"}
_PASSING_STATUS = {408, 425, 429}
_VERSION_KEYS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "last_modified", "mtime", "created")


class ChangedError(Exception):
    """A file is no longer the one that was being read."""


def filesystem(url: str, **options: Any) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL or path, and the file's name in it.

    Ask again in a forked process: a file system of its parent is of no use there.

    Raises:
        ValueError: When its package is not installed, naming the pip command; or when there is no such scheme.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        protocol = fsspec.utils.get_protocol(url)
        extra = _EXTRA_OF_PROTOCOL.get(protocol)
        cure = f"pip install 'clipfilter-wds[{extra}]'" if extra else str(error)
        raise ValueError(f"{protocol}:// needs a package that is not installed: {cure}") from None
    return fs, path


def protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """The schemes that a file system answers to."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether its files are this machine's."""
    return "file" in protocols(fs)


# --- forks ---

_kept_over_fork: list[object] = []


def _keep_over_fork() -> None:
    # fsspec drops its file systems in a forked child. Closing them there would take their connections off the event
    # loop's list of what to watch, which parent and child share, and the parent would wait for ever. So they are kept.
    _kept_over_fork.extend(fs for kind in list(registry.values()) for fs in list(kind._cache.values()))


os.register_at_fork(before=_keep_over_fork, after_in_parent=_kept_over_fork.clear)


# --- what goes wrong ---


def reason(error: BaseException, url: str) -> str:
    """Why storage failed at a URL, in words that hold no secret of it."""
    error = _behind(error)
    if isinstance(error, FileNotFoundError) or getattr(error, "status", None) == 404:
        return "there is no such file"
    text = without_secrets(getattr(error, "strerror", None) or str(error) or type(error).__name__)
    for secret in _secrets_of(url):
        text = text.replace(secret, "***")
    return text


def _secrets_of(url: str) -> list[str]:
    """User and password, password, and query of a URL, as far as it has them: libraries quote parts of URLs."""
    user = re.search(r"://([^\s/?]*)@", url)
    secrets = [user[1], user[1].partition(":")[2]] if user else []
    return [secret for secret in (*secrets, url.partition("?")[2]) if "=" in secret or len(secret) > 2]


def without_secrets(text: str) -> str:
    """The text with every URL in it stripped of user, password and query."""
    text = re.sub(r"(\w+://)[^\s/?'\"]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s?'\"]*)\?[^\s'\"]*=[^\s'\"]*", r"\1", text)  # without "=", it is a glob's ?


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: a missing file or a refused password won't."""
    error = _behind(error)
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _PASSING_STATUS
    return not isinstance(error, (*_PERMANENT, ChangedError)) and type(error).__name__ not in _PERMANENT_NAMES


def _behind(error: BaseException) -> BaseException:
    """What fsspec takes for a missing file when a web server does not answer as it should."""
    cause = error.__cause__
    of_the_web = isinstance(cause, TimeoutError) or type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if isinstance(error, FileNotFoundError) and cause is not None and of_the_web else error


def retrying(request: Callable[[], T]) -> T:
    """What a request returns, made again after growing pauses while what it raises may pass.

    Raises:
        Exception: The last attempt's.
    """
    for pause in RETRY_SECONDS:
        try:
            return request()
        except Exception as error:  # each storage has errors of its own
            if not may_pass(error):
                raise
        time.sleep(pause * random.uniform(0.5, 1.5))
    return request()


# --- reading ---


class RemoteReader(io.RawIOBase):
    """Reads a remote file once from front to back, and goes on where it was when a connection breaks.

    Args:
        url: The file.

    Attributes:
        num_bytes: Its size; -1 when the storage does not tell.
        version: What tells it from another file of that URL, as far as the storage does.

    Raises:
        Exception: The storage's own, when it can't be reached (retried) or has no such file (not retried).
        ChangedError: From ``read``, when the file was replaced between two connections.
    """

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        self._file: BinaryIO | None = None
        self.num_bytes, self.version = retrying(self._look)

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes; none at the end only, which is never before ``num_bytes`` bytes have come."""
        data: bytes = retrying(lambda: self._read(size))
        self._position += len(data)
        return data

    def close(self) -> None:
        """End the connection."""
        self._disconnect()
        super().close()

    def _look(self) -> tuple[int, tuple[Any, ...]]:
        fs, path = filesystem(self._url)
        info = fs.info(path)
        num_bytes = -1 if info.get("size") is None else int(info["size"])
        return num_bytes, (num_bytes, *(info.get(key) for key in _VERSION_KEYS))

    def _connect(self) -> None:
        fs, path = filesystem(self._url)
        if self._position:
            fs.invalidate_cache()
            if self._look()[1] != self.version:
                raise ChangedError("it changed while it was being read")
        if "http" in protocols(fs):
            self._file = _open_http(fs, path, self._position, self.num_bytes)
        else:
            self._file = fs.open(path, "rb")
            self._file.seek(self._position)

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._connect()
            assert self._file is not None
            data: bytes = self._file.read(size)
            if not data and self._position < self.num_bytes:
                raise ConnectionError(
                    f"the connection ended after {self._position} of {self.num_bytes} bytes; try again"
                )
        except Exception:
            self._disconnect()
            raise
        return data

    def _disconnect(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _open_http(fs: fsspec.AbstractFileSystem, path: str, position: int, num_bytes: int) -> BinaryIO:
    """A web server's file from a position on, in one request: not every server can deliver ranges."""
    from aiohttp import ClientTimeout

    # A shard may take hours to read, as slowly as its samples are used, but not a minute without a single byte.
    timeout = ClientTimeout(total=None, sock_connect=30, sock_read=60)
    headers = {**fs.kwargs.get("headers", {}), **({"Range": f"bytes={position}-"} if position else {})}
    # A stream needs no size, but without one fsspec would ask for it once more, and trip over the timeout.
    file: Any = fs.open(path, "rb", block_size=0, size=max(num_bytes, 1), headers=headers, timeout=timeout)
    skip = position if file.r.status != 206 else 0
    while skip > 0 and (data := file.read(min(skip, 1 << 20))):
        skip -= len(data)
    if skip:
        file.close()
        raise ConnectionError(f"the connection ended {skip} bytes before byte {position}; try again")
    return cast(BinaryIO, file)
