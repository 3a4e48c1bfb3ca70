"""Bytes -> what CLIP sees: an RGB image as a uint8 view, a caption as token ids. Picklable, so it runs in workers."""

import hashlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from clipfilter_wds.samples import IMAGE_EXTENSIONS, SampleLayout
from clipfilter_wds.types import DropReason, Sample

#: Pillow's names of the formats that are ever opened. None of them starts a program or runs a script.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

#: Version of the pixel and text policy in this file; part of the fingerprint of every score.
POLICY_VERSION = 1

_TXT = SampleLayout()

#: Longer captions are cut before they are tokenized, so their ``num_tokens`` counts this part only.
_MAX_CAPTION_CHARS = 1 << 16

#: Images that grow past this many pixels when their short side is resized (1 x 65000) are too large, like bombs are.
_MAX_RESIZED_PIXELS = 1 << 28


class UnusableError(Exception):
    """A sample that can't be scored, and why."""

    def __init__(self, reason: DropReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageView:
    """How an image becomes the model's input: shortest edge resized, centre cropped, both in uint8.

    The pixels equal those of ``transformers``' ``CLIPImageProcessor`` before it rescales and normalises.

    Attributes:
        resize: Length of the shortest edge after resizing, in pixels.
        crop: Height and width of the centre crop, in pixels.
        interpolation: torchvision's name of the resampling; antialiased.
        max_pixels: An image whose header declares more is dropped as ``image_too_large`` and not decoded.
    """

    resize: int
    crop: tuple[int, int]
    interpolation: str = "bicubic"
    max_pixels: int = 89_478_485  # Pillow's own limit

    def decode(self, data: bytes) -> Image.Image:
        """The first frame of an encoded image, as RGB.

        Raises:
            UnusableError: ``unreadable_image`` or ``image_too_large``.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of each odd file; the outcome is counted instead
                image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
                self._check_size(*image.size)
                return _to_rgb(image)
        except UnusableError:
            raise
        except Image.DecompressionBombError:
            raise UnusableError(DropReason.IMAGE_TOO_LARGE) from None
        except Exception as error:  # decoders fail with any type there is
            raise UnusableError(DropReason.UNREADABLE_IMAGE) from error

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Resize and crop an RGB image to uint8 ``[3, crop_height, crop_width]``."""
        # Channels-last is the layout that Pillow gives and that the antialiasing kernel is fastest on.
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        size = list(self._resized(*image.size))
        pixels = tvf.resize(pixels, size, InterpolationMode(self.interpolation), antialias=True)
        # CLIPImageProcessor rounds an odd margin down, torchvision's own center_crop to even.
        top, left = (int((side - cropped) / 2) for side, cropped in zip(size, self.crop, strict=True))
        view: torch.Tensor = tvf.crop(pixels, top, left, *self.crop).contiguous()
        return view

    def _check_size(self, width: int, height: int) -> None:
        resized_height, resized_width = self._resized(width, height)
        if width * height > self.max_pixels or resized_height * resized_width > _MAX_RESIZED_PIXELS:
            raise UnusableError(DropReason.IMAGE_TOO_LARGE)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        long = int(self.resize * max(width, height) / min(width, height))
        return (long, self.resize) if width <= height else (self.resize, long)


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow's convert saturates 16-bit greyscale to white; its own 8 high bits are the image.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    rgb = image.convert("RGB")
    if rgb.info.get("transparency") is None:
        return rgb
    # Pillow keeps a transparent colour (of a palette, or PNG's tRNS) beside the pixels, and CLIPImageProcessor puts
    # such an image on white. An alpha channel, in contrast, is gone after convert.
    white = Image.new("RGBA", rgb.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgb.convert("RGBA")).convert("RGB")


class Tokens(NamedTuple):
    """A batch of captions.

    Attributes:
        input_ids: int64 ``[N, L]``, padded to the longest caption of the batch.
        num_tokens: Per caption, its length in tokens before it was truncated, start and end tokens included.
        truncated: Per caption, whether it was longer than the text tower takes.
    """

    input_ids: torch.Tensor
    num_tokens: list[int]
    truncated: list[bool]


class CaptionTokenizer:
    """Captions -> token ids as ``CLIPTokenizer(padding=True, truncation=True)`` gives them.

    Args:
        tokenizer: The Rust tokenizer of a ``transformers`` tokenizer.
        max_length: What the text tower takes, in tokens.
        pad_id: The token id that fills up shorter captions.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, pad_id: int) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(pad_id=pad_id)
        self._num_special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        self.max_length = max_length
        self.pad_id = pad_id

    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, rules and limits."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """Tokenize a batch of captions; ``[]`` gives ``[0, 0]`` ids."""
        encodings = self._tokenizer.encode_batch([_bounded(caption) for caption in captions])
        num_tokens = [
            sum(encoding.attention_mask)
            + sum(sum(rest.attention_mask) - self._num_special for rest in encoding.overflowing)
            for encoding in encodings
        ]
        ids = [encoding.ids for encoding in encodings]
        return Tokens(
            input_ids=torch.tensor(ids, dtype=torch.int64) if ids else torch.empty(0, 0, dtype=torch.int64),
            num_tokens=num_tokens,
            truncated=[bool(encoding.overflowing) for encoding in encodings],
        )


def _bounded(caption: str) -> str:
    """A caption whose tokenizing takes bounded time, cut far behind the last token that counts."""
    return caption if len(caption) <= _MAX_CAPTION_CHARS else " ".join(caption.split())[:_MAX_CAPTION_CHARS]


class OpenPair(NamedTuple):
    """A usable pair: the image's uint8 view, the caption, and the size of the image as stored, in pixels."""

    pixels: torch.Tensor
    caption: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPreprocess:
    """What a :class:`~clipfilter_wds.scorer.ClipScorer` needs done to a sample before it can score it."""

    view: ImageView
    tokenize: CaptionTokenizer

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a score depends on in this file. JSON-ready."""
        return {
            "resize": self.view.resize,
            "crop": list(self.view.crop),
            "interpolation": self.view.interpolation,
            "max_pixels": self.view.max_pixels,
            "tokenizer": self.tokenize.fingerprint(),
            "max_tokens": self.tokenize.max_length,
            "policy": POLICY_VERSION,
        }

    def __call__(self, sample: Mapping[str, Any], layout: SampleLayout = _TXT) -> dict[str, Any]:
        """A stage for a pipeline of your own: ``webdataset.WebDataset(...).map(scorer.preprocess).batched(64)``.

        Adds ``pixel_values`` (uint8 ``[3, H, W]``), ``input_ids`` (int64 ``[max_length]``) and ``reason``: empty,
        or why the sample can't be scored. Such samples go through, so that a ClipFilterLoader can count them.

        Args:
            sample: Members by extension: encoded bytes, or what webdataset decodes with ``decode("pil")``.
            layout: Where the caption is.
        """
        reason = ""
        try:
            image, caption = self._decode_members(sample, layout)
            pixels = self.view(image)
        except UnusableError as unusable:
            caption, pixels, reason = "", torch.zeros(3, *self.view.crop, dtype=torch.uint8), unusable.reason.value
        ids = self.tokenize([caption]).input_ids[0]
        padding = torch.full((self.tokenize.max_length - len(ids),), self.tokenize.pad_id)
        return {**sample, "pixel_values": pixels, "input_ids": torch.cat([ids, padding]), "reason": reason}

    def open_sample(self, sample: Sample, layout: SampleLayout) -> OpenPair:
        """Read caption and image of a sample, and prepare its view.

        Raises:
            UnusableError: With the reason that the sample is dropped for.
        """
        return self.prepare(*self.decode_sample(sample, layout))

    def decode_sample(self, sample: Sample, layout: SampleLayout) -> tuple[Image.Image, str]:
        """Read image (as RGB) and caption of a sample.

        Raises:
            UnusableError: With the reason that the sample is dropped for.
        """
        if sample.problem is not None:
            raise UnusableError(sample.problem)
        return self._decode_members({member.extension: member.data for member in sample.members}, layout)

    def _decode_members(self, members: Mapping[str, Any], layout: SampleLayout) -> tuple[Image.Image, str]:
        image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        if image is None:
            raise UnusableError(DropReason.MISSING_IMAGE)
        return self._decode_pair(image, read_caption(members, layout))

    def open_pair(self, encoded: bytes, caption: str) -> OpenPair:
        """Decode an image and prepare its view.

        Raises:
            UnusableError: ``blank_caption``, ``image_too_large`` or ``unreadable_image``.
        """
        return self.prepare(*self._decode_pair(encoded, caption))

    def _decode_pair(self, image: bytes | Image.Image, caption: str) -> tuple[Image.Image, str]:
        if not caption.strip():
            raise UnusableError(DropReason.BLANK_CAPTION)
        return _to_rgb(image) if isinstance(image, Image.Image) else self.view.decode(image), caption

    def prepare(self, image: Image.Image, caption: str) -> OpenPair:
        """Prepare the view of an RGB image."""
        return OpenPair(self.view(image), caption, *image.size)

    def collate(self, pairs: Sequence[OpenPair]) -> tuple[torch.Tensor, Tokens]:
        """Pairs -> what :class:`~clipfilter_wds.scorer.ClipScorer` scores: uint8 ``[N, 3, H, W]``, and tokens."""
        views = [pair.pixels for pair in pairs]
        pixel_values = torch.stack(views) if views else torch.empty(0, 3, *self.view.crop, dtype=torch.uint8)
        return pixel_values, self.tokenize([pair.caption for pair in pairs])


def read_caption(data: Mapping[str, Any], layout: SampleLayout) -> str:
    """The caption among a sample's members, encoded or decoded; bytes that are not UTF-8 are replaced.

    Raises:
        UnusableError: ``missing_caption``.
    """
    caption = data.get(layout.caption_extension)
    if isinstance(caption, bytes):
        caption = caption.decode("utf-8-sig", errors="replace")
    if layout.caption_field is not None:
        caption = _json_field(caption, layout.caption_field)
    if not isinstance(caption, str):
        raise UnusableError(DropReason.MISSING_CAPTION)
    return caption


def _json_field(record: Any, field: str) -> str | None:
    if isinstance(record, str):
        try:
            record = json.loads(record)
        except (ValueError, RecursionError):
            return None
    value = record.get(field) if isinstance(record, dict) else None
    # JSON can hold half a surrogate pair, which no tokenizer takes.
    return value.encode("utf-8", errors="replace").decode() if isinstance(value, str) else None
