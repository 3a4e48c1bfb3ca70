"""Reads an image file from a path or URL."""

from pathlib import Path
from typing import BinaryIO

from clipfilter_wds.storage.filesystem import check_installed
from clipfilter_wds.storage.open import open_once
from clipfilter_wds.types import DropReason, UnusableError

#: A larger file is dropped as ``member_too_large``, like a member of a shard.
MAX_IMAGE_BYTES = 1 << 28

_WEB_SECONDS = 30.0
_READ_BYTES = 1 << 20


def is_remote(image: str) -> bool:
    """Whether this is the URL of something other than a file on this machine."""
    return "://" in image and not image.startswith("file://")


def check_protocol(image: str) -> None:
    """Check before a run that no package is missing for fetching an image.

    Raises:
        ValueError: When the storage of this URL needs a package that is not installed.
    """
    if is_remote(image):
        check_installed(image)


def read_image(image: str, folder: Path) -> bytes:
    """Read an image file. What comes over a network is requested once, without retries: many links are dead.

    Args:
        image: A path, relative to ``folder`` if it is not absolute, or an ``http(s)://`` or other fsspec URL.
        folder: Where relative paths begin.

    Raises:
        UnusableError: ``unreadable_image`` when it can't be opened or fetched for any reason, or ``member_too_large``.
    """
    try:
        data = _fetch(image) if is_remote(image) else _read_file(folder / image.removeprefix("file://"))
    except Exception as error:  # each storage has errors of its own
        raise UnusableError(DropReason.UNREADABLE_IMAGE) from error
    if len(data) > MAX_IMAGE_BYTES:
        raise UnusableError(DropReason.MEMBER_TOO_LARGE)
    return data


def _read_file(path: Path) -> bytes:
    # Before opening: opening a named pipe would wait for a writer, and reading some devices never ends.
    if not path.is_file():
        raise OSError(f"{str(path)!r} is not a file")
    with path.open("rb") as file:
        return file.read(MAX_IMAGE_BYTES + 1)


def _fetch(url: str) -> bytes:
    with open_once(url, seconds=_WEB_SECONDS) as file:
        return _read_bounded(file)


def _read_bounded(file: BinaryIO) -> bytes:
    data = bytearray()
    while len(data) <= MAX_IMAGE_BYTES and (piece := file.read(_READ_BYTES)):
        data += piece
    return bytes(data)
