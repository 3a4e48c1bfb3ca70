"""Prepares samples for CLIP: opens their pairs, and makes the views and token ids that a scorer takes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from PIL import Image

from clipfilter_wds.preprocess.image import ImageView, RgbImage
from clipfilter_wds.preprocess.members import (
    ImageDecoder,
    captions_in,
    decode_member,
    decode_members,
    decode_pair,
    decode_sample,
    stored_image,
)
from clipfilter_wds.preprocess.packed import ImagePacker, packed_bytes
from clipfilter_wds.preprocess.tokens import CaptionTokenizer, Tokens, bounded
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.types import DropReason, Sample, UnusableError

#: Version of the pixel and text policy in this file; part of the fingerprint of every score.
POLICY_VERSION = 1

_TXT = SampleLayout()


#: Where a pair's image goes: a view's memory, uint8 ``[3 or 4, H, W]``, or what the device resizes it in.
ImageOut = torch.Tensor | ImagePacker


class OpenPair(NamedTuple):
    """A usable pair: the image's uint8 view, its captions, and the size of the image as stored, in pixels.

    What is packed for the device has the decoded image's pixels in the view's place.
    """

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
        """Size of a view in a batch: three bytes a pixel, or, where its colours are kept together, four.

        Where the device resizes images, the most that one takes.
        """
        if self.view.resize_on_device:
            return packed_bytes(self.view)
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
            "resize_on_device": self.view.resize_on_device,
            "tokenizer": self.tokenize.fingerprint(),
            "max_tokens": self.tokenize.max_length,
            "pads_to_max": self.tokenize.pads_to_max,
            "policy": POLICY_VERSION,
        }

    def __call__(
        self, sample: Mapping[str, Any], layout: SampleLayout = _TXT, columns: Sequence[str] = ()
    ) -> dict[str, Any]:
        """A stage for a webdataset pipeline, which gives every sample the same columns, so that any can share a batch.

        These are ``image`` (Pillow's RGB image, for a training view) and ``text`` (the caption; the list of them
        where there are several), with ``pixel_values``, ``input_ids`` and ``reason`` as :meth:`pair` makes them,
        ``__key__`` and ``__url__``. A sample that can't be scored has a black image and an empty text, and is passed on
        so that what filters can count it.

        Args:
            sample: Members by extension: encoded bytes, or what webdataset decodes with ``decode("pil")``.
            layout: Where image and caption are.
            columns: Other members to pass on, decoded by their extensions (``decode_member``) where they are bytes;
                None where a sample lacks one.

        Raises:
            ValueError: When image and caption seem to have other names, or the device is to resize images.
            TypeError: When the image is neither encoded nor Pillow's.
        """
        self._check_makes_views()
        _check_names(sample, layout)
        try:
            rgb, captions = decode_members(sample, layout, self.view)
            whole = rgb
            if rgb.scale > 1:  # training gets none at a reduced size
                whole, _ = decode_members(sample, layout, replace(self.view, fast_decode=False))
        except UnusableError as unusable:
            image, captions = Image.new("RGB", self.view.crop[::-1]), [""]
            inputs = self._no_inputs(unusable.reason)
        else:
            image, inputs = whole.image, self._inputs(rgb, captions)
        passed_on = {name: sample[name] for name in ("__key__", "__url__") if name in sample}
        for name in columns:
            value = sample.get(name)
            passed_on[name] = decode_member(name, value) if isinstance(value, bytes) else value
        return {**passed_on, "image": image, "text": captions[0] if len(captions) == 1 else captions, **inputs}

    def pair(self, image: Any, caption: str | Iterable[str | None] | None) -> dict[str, Any]:
        """The columns that a filter needs of a pair, for samples of any kind.

        Args:
            image: Bytes of an image file, a Pillow image, ``{"bytes": ..., "path": ...}`` as Hugging Face has images
                that it does not decode, or None.
            caption: Or several of one image, in a list or an array; entries that are no text are left out.

        Returns:
            ``pixel_values`` (uint8 ``[3, H, W]``), ``input_ids`` (int64 ``[max_length]``, or ``[K, max_length]`` for K
            captions) and ``reason``: empty, or why the pair can't be scored.

        Raises:
            ValueError: When the device is to resize images.
            TypeError: When the image is none of these, or the caption no text.
        """
        self._check_makes_views()
        try:
            return self._inputs(*decode_pair(stored_image(image), captions_in(caption), self.view))
        except UnusableError as unusable:
            return self._no_inputs(unusable.reason)

    def _check_makes_views(self) -> None:
        if self.view.resize_on_device:
            raise ValueError(
                "resize_on_device is for what reads shards and tables itself; in another pipeline each sample has its "
                "view, all of one size, before it goes to the device: make the scorer without resize_on_device"
            )

    def _inputs(self, rgb: RgbImage, captions: list[str]) -> dict[str, Any]:
        ids = self.tokenize.fit(self.tokenize([captions]).input_ids[0], self.tokenize.max_length)
        return {"pixel_values": self.view(rgb), "input_ids": ids, "reason": ""}

    def _no_inputs(self, reason: DropReason) -> dict[str, Any]:
        """The same of a pair that can't be scored: tensors of the same shapes, which nothing looks at."""
        ids = torch.full((self.tokenize.max_length,), self.tokenize.pad_id)
        pixels = torch.zeros(3, *self.view.crop, dtype=torch.uint8)
        return {"pixel_values": pixels, "input_ids": ids, "reason": reason.value}

    def open_sample(self, sample: Sample, layout: SampleLayout, out: ImageOut | None = None) -> OpenPair:
        """Read caption and image of a sample, and prepare its view, in ``out`` if that is given.

        Raises:
            UnusableError: With the reason that the sample is dropped for.
        """
        return self.prepare(*decode_sample(sample, layout, self.decoder(out)), out)

    def open_pair(self, encoded: bytes, caption: str, out: ImageOut | None = None) -> OpenPair:
        """Decode an image and prepare its view, in ``out`` if that is given.

        Raises:
            UnusableError: ``blank_caption``, ``image_too_large`` or ``unreadable_image``.
        """
        return self.prepare(*decode_pair(encoded, [caption], self.decoder(out)), out)

    def decoder(self, out: ImageOut | None) -> ImageDecoder:
        """What decodes an image that goes there."""
        return out if isinstance(out, ImagePacker) else self.view

    def prepare(self, rgb: RgbImage, captions: list[str], out: ImageOut | None = None) -> OpenPair:
        """Prepare the view of a decoded image, in ``out`` if that is given."""
        pixels = out.add(rgb) if isinstance(out, ImagePacker) else self.view(rgb, out)
        # A batch of captions waits to be tokenized, so no more is held of them than that takes.
        return OpenPair(pixels, list(map(bounded, captions)), rgb.width, rgb.height)

    def collate(self, pairs: Sequence[OpenPair]) -> tuple[torch.Tensor, Tokens]:
        """A few pairs that were opened one by one -> what ``ClipScorer`` scores: uint8 ``[N, 3, H, W]``, and tokens."""
        views = [pair.pixels for pair in pairs]
        pixel_values = torch.stack(views) if views else torch.empty(0, 3, *self.view.crop, dtype=torch.uint8)
        return pixel_values, self.tokenize([pair.captions for pair in pairs])


def _check_names(sample: Mapping[str, Any], layout: SampleLayout) -> None:
    """Refuse a sample whose image or caption was decoded or renamed to what the layout does not know.

    One that has neither, and nothing that could be it, is a bad sample and no mistake.

    Raises:
        ValueError: With the columns that there are.
    """
    if not layout.caption_extensions.isdisjoint(sample) or not set(layout.image_extensions).isdisjoint(sample):
        return
    columns = [name for name in sample if not name.startswith("__")]
    if any(isinstance(sample[name], str | Image.Image) for name in columns):
        raise ValueError(
            f"a sample has the columns {columns}, no image ({', '.join(layout.image_extensions)}) and no caption "
            f"({layout.caption}). scorer.preprocess takes the members of a shard, before they are renamed; of samples "
            "of another kind, give image and caption to scorer.preprocess.pair"
        )
