"""Reads image, captions and uid from the members of a sample."""

import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from clipfilter_wds.preprocess.image import ImageView, RgbImage
from clipfilter_wds.shards.samples import IMAGE_EXTENSIONS, SampleLayout
from clipfilter_wds.storage.text import decode_text
from clipfilter_wds.types import DropReason, Sample, UnusableError

_UID = re.compile(r"[0-9a-fA-F]{32}")


def decode_sample(sample: Sample, layout: SampleLayout, view: ImageView) -> tuple[RgbImage, list[str]]:
    """Read image and captions of a sample, one at least.

    Raises:
        UnusableError: With the reason that the sample is dropped for.
    """
    if sample.problem is not None:
        raise UnusableError(sample.problem)
    return decode_members({member.extension: member.data for member in sample.members}, layout, view)


def decode_members(members: Mapping[str, Any], layout: SampleLayout, view: ImageView) -> tuple[RgbImage, list[str]]:
    """Image and captions of a sample whose members are given by extension; raises as :func:`decode_sample`."""
    return decode_pair(first_image(members), read_captions(members, layout), view)


def decode_pair(image: bytes | Image.Image, captions: list[str], view: ImageView) -> tuple[RgbImage, list[str]]:
    """The decoded image, and the captions that are not blank; raises as :func:`decode_sample`."""
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise UnusableError(DropReason.BLANK_CAPTION)
    return RgbImage.of(image) if isinstance(image, Image.Image) else view.decode(image), captions


def first_image(data: Mapping[str, Any]) -> Any:
    """The image among a sample's members, encoded or decoded.

    Raises:
        UnusableError: ``missing_image``.
    """
    image = next((data[extension] for extension in IMAGE_EXTENSIONS if extension in data), None)
    if image is None:
        raise UnusableError(DropReason.MISSING_IMAGE)
    return image


def read_captions(data: Mapping[str, Any], layout: SampleLayout) -> list[str]:
    """The captions among a sample's members, encoded or decoded; bytes that are not UTF-8 are replaced.

    Raises:
        UnusableError: ``missing_caption`` when there is none.
    """
    captions = [caption for source in layout.caption_sources for caption in _captions_of(data, *source)]
    if not captions:
        raise UnusableError(DropReason.MISSING_CAPTION)
    return captions


def _captions_of(data: Mapping[str, Any], extension: str, field: str | None) -> list[str]:
    caption = data.get(extension)
    if isinstance(caption, bytes):
        caption = decode_text(caption, errors="replace")
    if field is not None:
        return _json_texts(caption, field)
    return [caption] if isinstance(caption, str) else []


def read_uid(sample: Sample) -> bytes | None:
    """The 16 bytes of a sample's ``uid``, 32 hexadecimal digits in its json member; None where there is none."""
    data = next((member.data for member in sample.members if member.extension == "json"), None)
    uids = [] if data is None else _json_texts(decode_text(data, errors="replace"), "uid")
    return bytes.fromhex(uids[0]) if len(uids) == 1 and _UID.fullmatch(uids[0]) else None


def _json_texts(record: Any, field: str) -> list[str]:
    """What a field of a JSON object holds: a text, or the texts of a list."""
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError):
            return []
    value = record.get(field) if isinstance(record, dict) else None
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    # JSON can hold half a surrogate pair, which no tokenizer takes.
    return [text.encode("utf-8", errors="replace").decode() for text in texts]
