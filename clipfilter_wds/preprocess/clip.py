"""Prepares samples for CLIP: opens their pairs, and makes the views and token ids that a scorer takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch

from clipfilter_wds.preprocess.image import ImageView, RgbImage
from clipfilter_wds.preprocess.members import decode_members, decode_pair, decode_sample
from clipfilter_wds.preprocess.tokens import CaptionTokenizer, Tokens, bounded
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.types import Sample, UnusableError

#: Version of the pixel and text policy in this file; part of the fingerprint of every score.
POLICY_VERSION = 1

_TXT = SampleLayout()


class OpenPair(NamedTuple):
    """A usable pair: the image's uint8 view, its captions, and the size of the image as stored, in pixels."""

    pixels: torch.Tensor
    captions: list[str]
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipPreprocess:
    """Prepares samples for a ``ClipScorer``."""

    view: ImageView
    tokenize: CaptionTokenizer

    def with_view(self, **changes: Any) -> Self:
        """The same, but for these fields of the view."""
        return replace(self, view=replace(self.view, **changes))

    def view_bytes(self, *, interleaved: bool) -> int:
        """Size of a view in a batch: three bytes a pixel, or, where its colours are kept together, four."""
        height, width = self.view.crop
        return height * width * (4 if interleaved else 3)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that a score depends on here. JSON-ready."""
        return {
            "resize": self.view.resize if isinstance(self.view.resize, int) else list(self.view.resize),
            "crop": list(self.view.crop),
            "interpolation": self.view.interpolation,
            "resampler": self.view.resampler,
            "max_pixels": self.view.max_pixels,
            "fast_decode": self.view.fast_decode,
            "tokenizer": self.tokenize.fingerprint(),
            "max_tokens": self.tokenize.max_length,
            "pads_to_max": self.tokenize.pads_to_max,
            "policy": POLICY_VERSION,
        }

    def __call__(self, sample: Mapping[str, Any], layout: SampleLayout = _TXT) -> dict[str, Any]:
        """A stage for a pipeline of your own: ``webdataset.WebDataset(...).map(scorer.preprocess).batched(64)``.

        Adds ``pixel_values`` (uint8 ``[3, H, W]``), ``input_ids`` (int64 ``[max_length]``, or ``[K, max_length]`` for
        K captions) and ``reason``: empty, or why the sample can't be scored. Such samples are passed on, so that a
        ClipFilterLoader can count them.

        Args:
            sample: Members by extension: encoded bytes, or what webdataset decodes with ``decode("pil")``.
            layout: Where image and caption are.
        """
        reason = ""
        try:
            rgb, captions = decode_members(sample, layout, self.view)
            pixels = self.view(rgb)
        except UnusableError as unusable:
            captions, pixels, reason = [""], torch.zeros(3, *self.view.crop, dtype=torch.uint8), unusable.reason.value
        ids = self.tokenize([captions]).input_ids[0]
        padding = (0, self.tokenize.max_length - ids.shape[-1])
        padded = torch.nn.functional.pad(ids, padding, value=self.tokenize.pad_id)
        return {**sample, "pixel_values": pixels, "input_ids": padded, "reason": reason}

    def open_sample(self, sample: Sample, layout: SampleLayout, out: torch.Tensor | None = None) -> OpenPair:
        """Read caption and image of a sample, and prepare its view, in ``out`` if that is given.

        Raises:
            UnusableError: With the reason that the sample is dropped for.
        """
        return self.prepare(*decode_sample(sample, layout, self.view), out)

    def open_pair(self, encoded: bytes, caption: str, out: torch.Tensor | None = None) -> OpenPair:
        """Decode an image and prepare its view, in ``out`` if that is given.

        Raises:
            UnusableError: ``blank_caption``, ``image_too_large`` or ``unreadable_image``.
        """
        return self.prepare(*decode_pair(encoded, [caption], self.view), out)

    def prepare(self, rgb: RgbImage, captions: list[str], out: torch.Tensor | None = None) -> OpenPair:
        """Prepare the view of a decoded image, in ``out`` if that is given."""
        # A batch of captions waits to be tokenized, so no more is held of them than that takes.
        return OpenPair(self.view(rgb, out), list(map(bounded, captions)), rgb.width, rgb.height)

    def collate(self, pairs: Sequence[OpenPair]) -> tuple[torch.Tensor, Tokens]:
        """A few pairs that were opened one by one -> what ``ClipScorer`` scores: uint8 ``[N, 3, H, W]``, and tokens."""
        views = [pair.pixels for pair in pairs]
        pixel_values = torch.stack(views) if views else torch.empty(0, 3, *self.view.crop, dtype=torch.uint8)
        return pixel_values, self.tokenize([pair.captions for pair in pairs])
