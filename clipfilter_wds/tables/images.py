"""Reads an image file from a path or URL."""

from pathlib import Path
from typing import BinaryIO, Self

from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.filesystem import check_installed
from clipfilter_wds.storage.open import open_once
from clipfilter_wds.storage.url import parse_url
from clipfilter_wds.types import DropReason, UnusableError

#: A larger file is dropped as ``member_too_large``, like a member of a shard.
MAX_IMAGE_BYTES = 1 << 28

_WEB_SECONDS = 30.0
_READ_BYTES = 1 << 20
#: Of a name, what is looked at for secrets, and what is shown.
_MAX_NAME_CHARS, _MAX_SHOWN_CHARS = 1000, 200


class StoredImage(str):
    """The name of an image whose bytes the table itself holds.

    Pickled alone it is only the name, so that what comes back from a worker does not carry the image.

    Attributes:
        data: The bytes of the image file.
    """

    data: bytes

    def __new__(cls, name: str, data: bytes) -> Self:
        """Name the image."""
        image = super().__new__(cls, name)
        image.data = data
        return image

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


class SeveralImages(str):
    """The names of several images, where a row should have one."""

    __slots__ = ()


def shown_name(image: str | None) -> str:
    """What messages call an image: quoted, without a URL's secrets, and cut where it is long, as encoded images are."""
    if image is None:
        return "None"
    name = without_secrets(image[:_MAX_NAME_CHARS])
    return repr(name) if len(name) <= _MAX_SHOWN_CHARS else f"{name[:_MAX_SHOWN_CHARS]!r} …"


def is_remote(image: str) -> bool:
    """Whether this is the URL of something other than a file on this machine."""
    return not isinstance(image, StoredImage | SeveralImages) and parse_url(image).local_path is None


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
        image: A path, relative to ``folder`` if it is not absolute, an ``http(s)://`` or other fsspec URL, or one whose
            bytes are there already.
        folder: Where relative paths begin.

    Raises:
        UnusableError: ``unreadable_image`` when it can't be opened or fetched for any reason, ``member_too_large``, or
            ``several_images``.
    """
    if isinstance(image, SeveralImages):
        raise UnusableError(DropReason.SEVERAL_IMAGES)
    try:
        data = _read(image, folder)
    except Exception as error:  # each storage has errors of its own
        raise UnusableError(DropReason.UNREADABLE_IMAGE) from error
    if len(data) > MAX_IMAGE_BYTES:
        raise UnusableError(DropReason.MEMBER_TOO_LARGE)
    return data


def _read(image: str, folder: Path) -> bytes:
    if isinstance(image, StoredImage):
        return image.data
    if is_remote(image):
        return _fetch(image)
    return _read_file(folder / (image if parse_url(image).scheme is None else image.partition("://")[2]))


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
