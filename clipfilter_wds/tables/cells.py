"""Reads what the cells of a table say of an image and of its caption."""

import math
import os
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np

from clipfilter_wds.tables.images import SeveralImages, StoredImage, check_protocol

#: The name of an image that the table holds without one.
_UNNAMED = "<bytes>"


def image_of(cell: object) -> str | None:
    """The path or URL of an image, or a :class:`StoredImage` where the table holds its bytes; None where it has none.

    Taken are text, numbers as they print, paths, the bytes of an image file, ``{"bytes": ..., "path": ...}`` as in
    Hugging Face's tables, and a list of one of these. What is none of these (NaN, None) is missing.

    Raises:
        ValueError: When the image's storage needs a package that is not installed.
    """
    cell = _only(cell)
    if _is_list(cell):
        return SeveralImages(", ".join(str(_image(each)) for each in cell))
    image = _image(cell)
    if image is not None and not isinstance(image, StoredImage):
        check_protocol(image)
    return image


def caption_of(cell: object) -> str | None:
    """A caption: text, a number as it prints, or a list of one of these; None where there is none."""
    text = _text(_only(cell))
    # JSON can hold half a surrogate pair, which no tokenizer takes.
    return None if text is None else text.encode("utf-8", errors="replace").decode()


def _image(cell: object) -> str | None:
    if isinstance(cell, bytes | bytearray | memoryview):
        return StoredImage(_UNNAMED, bytes(cell))
    if isinstance(cell, Mapping):
        path, data = _image(cell.get("path")), cell.get("bytes")
        return StoredImage(path or _UNNAMED, bytes(data)) if isinstance(data, bytes | bytearray | memoryview) else path
    return _text(os.fsdecode(cell) if isinstance(cell, os.PathLike) else cell)


def _text(cell: object) -> str | None:
    if isinstance(cell, Real | Decimal):
        is_whole = isinstance(cell, Integral)  # and maybe larger than any float
        return str(cell) if is_whole or not math.isnan(cell) else None
    return cell if isinstance(cell, str) and cell.strip() else None


def _only(cell: object) -> object:
    """What a list of one holds, None for an empty one, and anything else as it is."""
    while _is_list(cell) and len(cell) <= 1:
        cell = next(iter(cell), None)
    return cell


def _is_list(cell: object) -> TypeGuard[list[Any]]:
    return isinstance(cell, list | tuple) or (isinstance(cell, np.ndarray) and cell.ndim > 0)
