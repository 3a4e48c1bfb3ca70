"""Image paths and URLs -> the bytes of one image file."""

import stat
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from aiohttp import ClientTimeout

from clipfilter_wds.types import DropReason, UnusableError

#: A larger file is dropped as ``member_too_large``, like a member of a shard.
MAX_IMAGE_BYTES = 1 << 28

_HTTP_SECONDS = 30.0
_READ_BYTES = 1 << 20


def is_remote(image: str) -> bool:
    """Whether this is a URL of something that is not a file on this machine."""
    return "://" in image and not image.startswith("file://")


def check_protocol(image: str) -> None:
    """Find out before a run that its images can't be fetched for want of a package.

    Raises:
        ValueError: When fsspec needs a package for this URL that is not installed.
    """
    if is_remote(image):
        _check_installed(fsspec.utils.get_protocol(image))


@cache
def _check_installed(protocol: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ValueError(f"reading {protocol}:// images needs a package that is not installed: {error}") from None
    except ValueError:
        pass  # no storage of that name: an image that can't be fetched, like any wrong URL


def read_image(image: str, folder: Path) -> bytes:
    """The bytes of an image file.

    Args:
        image: A path, relative to ``folder`` if it is not absolute, or an ``http(s)://`` or other fsspec URL.
        folder: Where relative paths begin.

    Raises:
        UnusableError: ``unreadable_image`` when it can't be opened or fetched for any cause, or ``member_too_large``.
    """
    try:
        data = _fetch(image) if is_remote(image) else _read_file(folder / image.removeprefix("file://"))
    except Exception as error:  # each storage has errors of its own
        raise UnusableError(DropReason.UNREADABLE_IMAGE) from error
    if len(data) > MAX_IMAGE_BYTES:
        raise UnusableError(DropReason.MEMBER_TOO_LARGE)
    return data


def _read_file(path: Path) -> bytes:
    # Before opening: to open a pipe would wait for somebody to write, and to read some devices never ends.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{str(path)!r} is not a file")
    with path.open("rb") as file:
        return file.read(MAX_IMAGE_BYTES + 1)


def _fetch(url: str) -> bytes:
    if url.startswith(("http://", "https://")):
        fs, path = fsspec.core.url_to_fs(url, client_kwargs={"timeout": ClientTimeout(total=_HTTP_SECONDS)})
        # No block size: one streamed request. A size, which nothing checks, saves the request that asks for it.
        options: dict[str, Any] = {"block_size": 0, "size": 1}
    else:
        (fs, path), options = fsspec.core.url_to_fs(url), {}
    with fs.open(path, "rb", **options) as file:
        return _read_bounded(file)


def _read_bounded(file: BinaryIO) -> bytes:
    data = bytearray()
    while len(data) <= MAX_IMAGE_BYTES and (piece := file.read(_READ_BYTES)):
        data += piece
    return bytes(data)
