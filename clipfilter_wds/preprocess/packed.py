"""Packs decoded images of any size into the memory of a batch, for the device to resize them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from PIL import Image

from clipfilter_wds.preprocess.image import ImageView, Resizing, RgbImage

#: Number of bytes -> memory for the images of a batch, uint8 ``[number]``.
BufferProvider = Callable[[int], torch.Tensor]

#: An image of more pixels, or with a longer side, is resized where it is decoded, so that batches take bounded memory.
MOST_PIXELS, MOST_SIDE = 512 * 512, 1024

#: Pillow resizes images that are taller than so many times their width in another order, which rounds differently.
_PILLOWS_TALLEST = 2

#: Behind the last image, so that as many bytes as the longest row has can be read from where any row begins.
_SLACK = 3 * MOST_SIDE

#: How much more memory is asked for than a batch takes if its other images are like those so far.
_MARGIN = 1.1

#: What is known of a packed image, as float64, which holds all of it exactly: where its first byte is; its height and
#: width in pixels; and its ``Resizing``.
PLACE = np.dtype(
    [
        (name, np.float64)
        for name in (
            "offset",
            "height",
            "width",
            "source_height",
            "source_width",
            "to_height",
            "to_width",
            "top",
            "left",
        )
    ]
)


@dataclass(frozen=True, eq=False)
class PackedImages:
    """N images of any size, which stand for the views that they are to become, uint8 ``[N, 3, H, W]``.

    Attributes:
        pixels: uint8 ``[num_bytes]``: of one image after another the rows, of three bytes a pixel; and some more bytes.
        places: Where each of them is, and how it is resized, ``[N]`` of ``PLACE``.
        size: Height and width of the views.
        interpolation: Of the views, bilinear or bicubic.
    """

    pixels: torch.Tensor
    places: np.ndarray
    size: tuple[int, int]
    interpolation: str

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, images: slice) -> Self:
        return replace(self, places=self.places[images])


#: What a scorer takes: views, uint8 ``[N, 3, H, W]``, or what it makes them of.
Images = torch.Tensor | PackedImages


class ImagePacker:
    """Decodes images straight into the memory of a batch.

    An image that is too large for that is resized here, whatever else the batch holds, so that a sample's pixels depend
    on the sample alone.

    Args:
        view: What the images are to become.
        batch_size: The most images of a batch.
        buffers: Gives the memory for each batch. Asked for more, it may give other memory.
    """

    def __init__(self, view: ImageView, batch_size: int, buffers: BufferProvider) -> None:
        self._view, self._batch_size, self._buffers = view, batch_size, buffers
        self._most_bytes = batch_size * packed_bytes(view) + _SLACK
        self._num_asked = 0  # of the last batch, so that the next one begins with as much
        self._clear()

    def _clear(self) -> None:
        self._memory = np.empty(0, dtype=np.uint8)
        self._places: list[tuple[float, ...]] = []
        self._ends = [0]
        self._here: RgbImage | None = None

    def at(self, number: int) -> Self:
        """Have the next image be this one of the batch. What was packed as that before is gone."""
        del self._places[number:], self._ends[number + 1 :]
        return self

    def decode(self, data: bytes) -> RgbImage:
        """As :meth:`ImageView.decode`; the pixels are valid until another image is decoded here."""
        self._here = rgb = self._view.decode(data, self._room)
        return rgb

    def convert(self, image: Image.Image) -> RgbImage:
        """As :meth:`ImageView.convert`."""
        return self._view.convert(image)

    def add(self, rgb: RgbImage) -> torch.Tensor:
        """Pack an image. Returns what was packed, uint8 ``[3, H, W]``, channels last in memory."""
        width, height = (-(-side // rgb.scale) for side in (rgb.width, rgb.height))
        resizing = self._view.resizing(rgb)
        is_whole = self._is_packed_whole(height, width)
        if not is_whole:
            height, width = self._view.crop
            resizing = Resizing((height, width), (height, width), (0, 0))
        room = self._reserve(height, width)
        if not is_whole:
            self._view(rgb, torch.from_numpy(room).permute(2, 0, 1))
        elif rgb is not self._here or not isinstance(rgb.decoded, torch.Tensor):
            room[:] = _array(rgb)
        self._places.append((self._ends[-1], height, width, *resizing.source, *resizing.size, *resizing.corner))
        self._ends.append(self._ends[-1] + room.nbytes)
        return torch.from_numpy(room).permute(2, 0, 1)

    def build(self) -> PackedImages:
        """What was packed. The next image is the first of another batch."""
        memory = torch.from_numpy(self._memory[: self._ends[-1] + _SLACK if self._places else 0])
        places = np.array(self._places, dtype=PLACE)
        self._clear()
        return PackedImages(memory, places, self._view.crop, self._view.interpolation)

    def _is_packed_whole(self, height: int, width: int) -> bool:
        is_other_way = self._view.resampler != "torchvision" and height > _PILLOWS_TALLEST * width
        return height * width <= MOST_PIXELS and max(height, width) <= MOST_SIDE and not is_other_way

    def _room(self, height: int, width: int) -> np.ndarray:
        """Where an image of this size is decoded to."""
        if self._is_packed_whole(height, width):
            return self._reserve(height, width)
        return np.empty((height, width, 4), dtype=np.uint8)

    def _reserve(self, height: int, width: int) -> np.ndarray:
        """Memory behind the last image, uint8 ``[H, W, 3]``."""
        start = self._ends[-1]
        stop = start + 3 * height * width
        if len(self._memory) < stop + _SLACK:
            self._grow(stop + _SLACK, start)
        return self._memory[start:stop].reshape(height, width, 3)

    def _grow(self, num_bytes: int, num_used: int) -> None:
        if num_bytes > self._num_asked:
            expected = num_bytes * self._batch_size / (len(self._places) + 1)
            self._num_asked = min(int(_MARGIN * expected), self._most_bytes)
        before, self._memory = self._memory, self._buffers(self._num_asked)[: self._num_asked].numpy()
        self._memory[:num_used] = before[:num_used]


def packed_bytes(view: ImageView) -> int:
    """The most bytes that an image takes in a batch."""
    return 3 * max(MOST_PIXELS, view.crop[0] * view.crop[1])


def _array(rgb: RgbImage) -> np.ndarray:
    """uint8 ``[H, W, 3]``."""
    if isinstance(rgb.decoded, Image.Image):
        return np.asarray(rgb.decoded)
    return rgb.decoded.permute(1, 2, 0)[..., :3].numpy()
