"""Views images as a small model does, and makes one that is larger than its file."""

import struct
import zlib

import pytest

from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.types import DropReason, UnusableError

VIEW = ImageView(resize=32, crop=(32, 32))


def reason_of(function, *args) -> DropReason:
    """Why the sample can't be used."""
    with pytest.raises(UnusableError) as unusable:
        function(*args)
    return unusable.value.reason


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixel."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT" + bytes(8)
