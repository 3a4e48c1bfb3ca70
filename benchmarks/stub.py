"""A scorer whose forward pass costs next to nothing, so that what is left is the host's work."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clipfilter_wds import ClipScorer
from clipfilter_wds.models.cosine import captions_of
from clipfilter_wds.models.device import resolve_device, to_device
from clipfilter_wds.models.device_resize import num_at_a_time
from clipfilter_wds.models.encoder import Check, no_check
from clipfilter_wds.preprocess.packed import PLACE, Images, PackedImages

#: Cosines of what is kept and of what is dropped, far from the threshold between them: nothing is scored again but the
#: one sample in a thousand that audits the error.
THRESHOLD = 0.25
_KEPT, _DROPPED = 0.35, 0.15

_WIDTH = 8


def stub_scorer(model: Path, *, device: str, kept: float, resize_on_device: bool = False) -> ClipScorer:
    """A scorer with the preprocessing of ``model``, that keeps this share of all pairs at :data:`THRESHOLD`."""
    is_on_gpu = resolve_device(device).type == "cuda"
    # Two encoders, hence rechecking, as on a GPU.
    precision = "fp16" if is_on_gpu else "bf16"
    scorer = _StubScorer(model, device=device, precision=precision, resize_on_device=resize_on_device)
    scorer.fast = _StubEncoder(scorer.device, kept)
    scorer.exact = _StubEncoder(scorer.device, kept)
    return scorer


class _StubScorer(ClipScorer):
    @property
    def copies_inputs(self) -> bool:
        """As on a GPU, which copies batches by itself, from the memory that workers share."""
        return True

    def views(self, images: Images) -> Tensor:
        """A CPU starts as many operations as resizing takes, each on next to no pixels, and leaves the views out."""
        if not isinstance(images, PackedImages) or self.device.type != "cpu" or not len(images):
            return super().views(images)
        at_a_time = num_at_a_time(images.places)
        for start in range(0, len(images), at_a_time):
            pixel = np.ones(len(images[start : start + at_a_time]), dtype=PLACE)
            pixel["offset"] = pixel["top"] = pixel["left"] = 0
            super().views(replace(images, places=pixel, size=(1, 1)))
        return torch.zeros(1, dtype=torch.uint8).expand(len(images), 3, *images.size)


class _StubEncoder(nn.Module):
    """Stands in for an ``Encoder``: moves pixels and tokens to the device, and computes nothing with the pixels.

    All images have one embedding. A caption has one of two, by its first letters, whatever it is encoded with.
    """

    #: For whoever splits the work: narrower than what a CPU would run several batches of at a time.
    width = 32
    batch_rows = 64
    is_graphed = False

    def __init__(self, device: torch.device, kept: float) -> None:
        super().__init__()
        self.device, self._kept = device, kept
        embeds = torch.zeros(2, _WIDTH)
        for row, cosine in enumerate((_DROPPED, _KEPT)):
            embeds[row, :2] = torch.tensor([cosine, (1 - cosine**2) ** 0.5])
        self._captions = embeds.to(device)
        self._image = torch.eye(1, _WIDTH, device=device)
        self._factors = torch.tensor([7, 31, 101, 3, 57, 211, 13, 89])

    def forward(self, pixel_values: Tensor, input_ids: Tensor, *, check: Check = no_check) -> tuple[Tensor, Tensor]:
        if not len(pixel_values):  # the end of a shard, say
            return self._image[:0], self._captions[:0]
        images = self.encode_image(pixel_values, check=check)
        return images, self.encode_text(captions_of(input_ids), check=check)

    def encode_image(self, pixel_values: Tensor, *, check: Check = no_check) -> Tensor:
        check()
        to_device(pixel_values, self.device)
        return self._image.expand(len(pixel_values), -1)

    def encode_text(self, input_ids: Tensor, *, check: Check = no_check) -> Tensor:
        check()
        to_device(input_ids, self.device)
        letters = input_ids[:, 1 : 1 + len(self._factors)].cpu()
        is_kept = (letters * self._factors).sum(dim=1) % 1000 < 1000 * self._kept
        return self._captions[to_device(is_kept.long(), self.device)]
