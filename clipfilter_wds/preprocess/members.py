"""Reads image, captions, uid and whatever else is wanted from the members of a sample."""

import io
import json
import re
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from clipfilter_wds.preprocess.image import RgbImage
from clipfilter_wds.preprocess.json_member import encodable, json_member, json_texts
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.storage.text import decode_text
from clipfilter_wds.types import DropReason, Sample, UnusableError

_UID = re.compile(r"[0-9a-fA-F]{32}")

#: An image has no more captions than this.
MAX_CAPTIONS = 1000

# The extensions that webdataset decodes without being told; pickles are not among them.
_TEXTS = ("txt", "text", "transcript")
_INTEGERS = ("cls", "cls2", "class", "count", "index", "inx", "id")
_MAX_TEXT_BYTES = SampleLayout().max_text_bytes


class ImageDecoder(Protocol):
    """Makes RGB images: an ``ImageView``, or an ``ImagePacker`` in the memory of a batch. Raises ``UnusableError``."""

    def decode(self, data: bytes) -> RgbImage:
        """Of an encoded image."""

    def convert(self, image: Image.Image) -> RgbImage:
        """Of one that Pillow has opened."""


def decode_sample(sample: Sample, layout: SampleLayout, decoder: ImageDecoder) -> tuple[RgbImage, list[str]]:
    """Read image and captions of a sample, one at least.

    Raises:
        UnusableError: With the reason that the sample is dropped for.
    """
    if sample.problem is not None:
        raise UnusableError(sample.problem)
    return decode_members({member.extension: member.data for member in sample.members}, layout, decoder)


def decode_members(
    members: Mapping[str, Any], layout: SampleLayout, decoder: ImageDecoder
) -> tuple[RgbImage, list[str]]:
    """Image and captions of a sample whose members are given by extension; raises as :func:`decode_sample`."""
    return decode_pair(first_image(members, layout), read_captions(members, layout), decoder)


def decode_pair(image: bytes | Image.Image, captions: list[str], decoder: ImageDecoder) -> tuple[RgbImage, list[str]]:
    """The decoded image, and the captions that are not blank; raises as :func:`decode_sample`.

    Raises:
        TypeError: When the image is neither encoded nor Pillow's.
    """
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise UnusableError(DropReason.BLANK_CAPTION)
    if isinstance(image, Image.Image):
        return decoder.convert(image), captions
    if not isinstance(image, bytes):
        raise TypeError(
            f"the image is a {type(image).__name__}; CLIP's view is made of the bytes of an image file or of a Pillow "
            "image, so this has to come before what makes tensors of images"
        )
    return decoder.decode(image), captions


def stored_image(value: Any) -> Any:
    """The image that a column of a table holds: ``{"bytes": ..., "path": ...}`` gives the bytes of the file.

    Raises:
        UnusableError: ``missing_image``, or ``unreadable_image`` where there is no such file.
    """
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        value = data if data is not None or path is None else _read_file(Path(path))
    if value is None:
        raise UnusableError(DropReason.MISSING_IMAGE)
    return bytes(value) if isinstance(value, bytearray | memoryview) else value


def _read_file(path: Path) -> bytes:
    try:
        if not path.is_file():  # to open a named pipe would wait for a writer
            raise UnusableError(DropReason.UNREADABLE_IMAGE)
        return path.read_bytes()
    except OSError as error:
        raise UnusableError(DropReason.UNREADABLE_IMAGE) from error


def captions_in(value: Any) -> list[str]:
    """The captions that a column of a table holds: text, or the texts of a list or an array.

    Raises:
        UnusableError: ``missing_caption``: None, what stands for it elsewhere (NaN, NA), or a list without a text.
        TypeError: When it is something else.
    """
    if isinstance(value, Mapping | bytes | bytearray | Integral):
        raise TypeError(f"the caption is a {type(value).__name__}; give a text, or a list of texts")
    texts = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    captions = [encodable(text) for text in texts if isinstance(text, str)]
    if not captions:
        raise UnusableError(DropReason.MISSING_CAPTION)
    return captions


def first_image(data: Mapping[str, Any], layout: SampleLayout) -> Any:
    """The image among a sample's members, encoded or decoded.

    Raises:
        UnusableError: ``missing_image``.
    """
    image = next((data[extension] for extension in layout.image_extensions if extension in data), None)
    if image is None:
        raise UnusableError(DropReason.MISSING_IMAGE)
    return image


def read_captions(data: Mapping[str, Any], layout: SampleLayout) -> list[str]:
    """The captions among a sample's members, encoded or decoded; bytes that are not UTF-8 are replaced.

    Of a text of more than the layout's ``max_text_bytes``, only the beginning is read.

    Raises:
        UnusableError: ``missing_caption`` when there is none, ``text_too_large`` when the json that it is in has more
            than ``max_text_bytes``, or there are more captions than an image may have.
    """
    captions = [caption for source in layout.caption_sources for caption in _captions_of(data, layout, *source)]
    if not captions:
        raise UnusableError(DropReason.MISSING_CAPTION)
    if len(captions) > MAX_CAPTIONS:
        raise UnusableError(DropReason.TEXT_TOO_LARGE)
    return captions


def _captions_of(data: Mapping[str, Any], layout: SampleLayout, extension: str, field: str | None) -> list[str]:
    caption, max_bytes = data.get(extension), layout.max_text_bytes
    if isinstance(caption, bytes):
        if field is not None and len(caption) > max_bytes:
            raise UnusableError(DropReason.TEXT_TOO_LARGE)
        caption = decode_text(caption[:max_bytes], errors="replace")
    if field is not None:
        return json_texts(caption, field)
    return [caption] if isinstance(caption, str) else []


def read_uid(sample: Sample) -> bytes | None:
    """The 16 bytes of a sample's ``uid``, 32 hexadecimal digits in its json member; None where there is none.

    A large json is not looked into, and one that doesn't have the word is not parsed.
    """
    text = json_member(sample)
    uids = json_texts(text, "uid") if text is not None and '"uid"' in text else []
    return bytes.fromhex(uids[0]) if len(uids) == 1 and _UID.fullmatch(uids[0]) else None


def decode_member(extension: str, data: bytes) -> Any:
    """What a member holds: text, a whole number, JSON, a numpy array of no objects; of any other extension its bytes.

    None where it is not what its extension says, or it is JSON of more than 4 MiB; of a longer text, that is read.
    Pickles are never decoded.
    """
    kind = extension.rpartition(".")[2]
    try:
        if kind in _TEXTS:
            return decode_text(data[:_MAX_TEXT_BYTES], errors="replace")
        if kind in _INTEGERS:
            return int(data)
        if kind in ("json", "jsn"):
            return json.loads(decode_text(data, errors="replace")) if len(data) <= _MAX_TEXT_BYTES else None
        if kind == "npy":
            return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception:  # noqa: BLE001  # readers of hostile data fail with any type there is
        return None
    return data
