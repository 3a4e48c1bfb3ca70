"""Resizes packed images on the device, to the pixels that resizing them on a CPU gives.

torchvision and Pillow resize uint8 images in whole numbers: weights are multiplied by a power of two and rounded, each
row is resized and rounded to uint8, and then each column. Here either step is a product of matrices. Pixels are shifted
to -128 ... 127, so that every sum is a whole number below 2^24, and float32 holds it exactly, in whatever order a
device adds it up. So pixels are the same bits on any device, and do not depend on what else is in the batch.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipfilter_wds.models.device import pixels_to_device, to_device
from clipfilter_wds.models.fast.float32 import exact_parts
from clipfilter_wds.preprocess.packed import Images, PackedImages

#: Pixels that are resized together, filled up to the largest image; in float32 they take 12 bytes each.
_PIXELS_AT_A_TIME = 1 << 24

#: Powers of two that weights are multiplied by, as torch does, so that the largest is below 2^15. It goes on to 2^22,
#: where sums would not be exact here.
_LEAST_BITS, _MOST_BITS = 14, 16

#: Pixels are shifted by so much.
_MIDDLE = 128


def views_on_device(images: Images, device: torch.device) -> Tensor:
    """uint8 ``[N, 3, H, W]`` on ``device``, without waiting for what a GPU still has to do."""
    if not isinstance(images, PackedImages):
        return pixels_to_device(images, device)
    with torch.autocast(device.type, enabled=False):  # which there may be around a training loop
        return resize_packed(images, device)


def resize_packed(images: PackedImages, device: torch.device) -> Tensor:
    """Resize and crop packed images on ``device``: uint8 ``[N, 3, H, W]``.

    The host looks at no image by itself, and the device is not waited for.
    """
    views = torch.empty(len(images), 3, *images.size, dtype=torch.uint8, device=device)
    if not len(images):
        return views
    order = np.lexsort((images.places["width"], images.places["height"]))  # so that little is filled up
    places = images.places[order]
    pixels, sent, numbers = (
        to_device(each, device) for each in (images.pixels, _table(places), torch.from_numpy(order))
    )
    weights = _Weights.of(
        Axes.of(sent), max(images.size), _num_taps(places, images.interpolation), images.interpolation
    )
    at_a_time = num_at_a_time(places)
    for start in range(0, len(places), at_a_time):
        some = slice(start, start + at_a_time)
        height, width = int(places["height"][some].max()), int(places["width"][some].max())
        rows = _unpack(pixels, sent[some], height, width)
        views[numbers[some]] = _resize(rows, weights, some, images.size)
    return views


def num_at_a_time(places: np.ndarray) -> int:
    """How many images, of those at ``places``, are resized together."""
    return max(1, _PIXELS_AT_A_TIME // int(places["height"].max() * places["width"].max()))


def _table(places: np.ndarray) -> Tensor:
    """What is known of each image, float64 ``[N, 9]``."""
    return torch.from_numpy(np.ascontiguousarray(places).view(np.float64).reshape(len(places), -1))


def _unpack(pixels: Tensor, sent: Tensor, height: int, width: int) -> Tensor:
    """float32 ``[N, height, 3, width]``, shifted; what is behind an image's last row or column is anything."""
    offsets, heights, widths = sent[:, :3, None].unbind(dim=1)
    row = torch.arange(height, dtype=torch.float64, device=pixels.device)
    starts = offsets + torch.minimum(row, heights - 1) * 3 * widths
    # All runs of bytes that are as long as the longest row, of which those are taken that begin where a row does.
    runs = pixels.as_strided((len(pixels) - 3 * width + 1, 3 * width), (1, 1))
    interleaved = runs[starts.long()].view(-1, height, width, 3).transpose(2, 3)
    return interleaved.to(torch.float32, memory_format=torch.contiguous_format).sub_(_MIDDLE)


def _resize(rows: Tensor, weights: "_Weights", some: slice, size: tuple[int, int]) -> Tensor:
    """uint8 ``[N, 3, *size]`` of shifted rows, float32 ``[N, height, 3, width]``, with the weights of these images."""
    num_images, height, _, width = rows.shape
    factors, added, divisor = weights.along(1, some, size[1], width)
    sums = _sum(rows.view(num_images, height * 3, width) @ part.mT for part in exact_parts(factors))
    rows = _rounded(sums.view(num_images, height, 3, size[1]), added[:, None, None], divisor)
    factors, added, divisor = weights.along(0, some, size[0], height)
    sums = _sum(part @ rows.view(num_images, height, 3 * size[1]) for part in exact_parts(factors))
    views = _rounded(sums.view(num_images, size[0], 3, size[1]), added[:, :, None, None], divisor)
    return views.add_(_MIDDLE).transpose(1, 2).to(torch.uint8)


def _sum(products: Iterable[Tensor]) -> Tensor:
    return functools.reduce(Tensor.add_, products)


def _rounded(sums: Tensor, added: Tensor, divisor: Tensor) -> Tensor:
    """Shifted pixels, as whole numbers in -128 ... 127."""
    return sums.add_(added).div_(divisor[:, None, None, None]).floor_().clamp_(-_MIDDLE, _MIDDLE - 1)


# --- weights ---


class Axes(NamedTuple):
    """How N images are resized down and across, float64 ``[2, N]`` each.

    Attributes:
        length: Pixels that there are.
        source: Pixels that are resized.
        size: Pixels after resizing.
        corner: The first of these that is in the view.
    """

    length: Tensor
    source: Tensor
    size: Tensor
    corner: Tensor

    @classmethod
    def of(cls, sent: Tensor) -> "Axes":
        """From what is known of each image, float64 ``[N, 9]``."""
        return cls(*sent[:, 1:].T.view(4, 2, -1).unbind())


class _Weights(NamedTuple):
    """What pixels of N images are multiplied by: whole numbers, as torch and Pillow have them.

    Attributes:
        first: The first pixel that each of the view is made of, int64 ``[2, N, S]``.
        taps: The weights of that and those behind it, float32 ``[2, N, S, T]``.
        added: What is added to each sum, float32 ``[2, N, S]``.
        divisor: What that is divided by, float32 ``[2, N]``.
    """

    first: Tensor
    taps: Tensor
    added: Tensor
    divisor: Tensor

    @classmethod
    def of(cls, axes: Axes, num_pixels: int, num_taps: int, interpolation: str) -> "_Weights":
        """Of ``num_pixels`` of each view down and across, each made of up to ``num_taps``."""
        size = axes.size[..., None]
        numbers = torch.arange(num_pixels, dtype=torch.float64, device=size.device) + axes.corner[..., None]
        is_inside = (numbers >= 0) & (numbers < size)
        # The first and last pixel of an image have the largest weights.
        numbers = torch.cat([torch.minimum(numbers.clamp(min=0.0), size - 1), torch.zeros_like(size), size - 1], dim=-1)
        first, taps = _taps(axes, numbers, num_taps, interpolation)
        largest = taps.amax(dim=(-2, -1))
        divisor = torch.full_like(largest, 2.0**_LEAST_BITS)
        for bits in range(_LEAST_BITS + 1, _MOST_BITS + 1):
            divisor = torch.where((largest * 2.0**bits + 0.5).floor() < 2**15, 2.0**bits, divisor)
        taps = (taps[..., :-2, :] * divisor[..., None, None]).round()
        taps = taps.masked_fill(~is_inside[..., None], 0.0)  # so that the view is black there
        added = _MIDDLE * (taps.sum(dim=-1) - divisor[..., None]) + divisor[..., None] / 2
        return cls(first[..., :-2].long(), taps.float(), added.float(), divisor.float())

    def along(self, axis: int, some: slice, num_pixels: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """What some images, of up to ``length`` pixels, are multiplied by along an axis: ``[n, num_pixels, length]``.

        Then what is added, and what that is divided by.
        """
        first, taps, added = (each[axis, some, :num_pixels] for each in (self.first, self.taps, self.added))
        num_taps = taps.shape[-1]
        places = first[..., None] + torch.arange(num_taps, device=taps.device)
        factors = taps.new_zeros(*taps.shape[:2], length + num_taps).scatter_(2, places, taps)
        return factors[..., :length], added, self.divisor[axis, some]


def _taps(axes: Axes, numbers: Tensor, num_taps: int, interpolation: str) -> tuple[Tensor, Tensor]:
    """The first pixel that each of the output's ``[2, N, P]`` is made of, and the weights of its ``[2, N, P, T]``.

    A pixel is the mean of those around it, weighted by a filter that is stretched to a pixel of the output where that
    is wider than one of the image.
    """
    reach, weight_at = _FILTERS[interpolation]
    scale = (axes.source / axes.size)[..., None]
    stretch = scale.clamp(min=1.0)
    centre = (numbers + 0.5) * scale
    first = (centre - reach * stretch + 0.5).floor().clamp(min=0.0)
    stop = torch.minimum((centre + reach * stretch + 0.5).floor(), axes.length[..., None])
    pixel = first[..., None] + torch.arange(num_taps, dtype=torch.float64, device=first.device)
    weights = weight_at((pixel - centre[..., None] + 0.5).abs() / stretch[..., None])
    weights = weights.masked_fill(pixel >= stop[..., None], 0.0)
    return first, weights / weights.sum(dim=-1, keepdim=True)


def _num_taps(places: np.ndarray, interpolation: str) -> int:
    """The most pixels that one of a view is made of, down or across."""
    stretch = max(
        1.0, *(float((places[f"source_{axis}"] / places[f"to_{axis}"]).max()) for axis in ("height", "width"))
    )
    return 2 * math.ceil(_FILTERS[interpolation][0] * stretch) + 1


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0.0)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -0.5."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far.masked_fill(distance >= 2, 0.0))


#: How far filters reach, in pixels of the wider one, and what they weigh at a distance.
_FILTERS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "bilinear": (1.0, _bilinear),
    "bicubic": (2.0, _bicubic),
}
