"""Decodes JPEGs without Pillow around the decoder: the same pixels in less time."""

import io
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from PIL import Image
from simplejpeg import decode_jpeg

#: What Pillow calls the JPEGs whose colours it leaves to libjpeg: YCbCr or RGB, and grey.
_PLAIN_MODES = ("RGB", "L")

#: Height and width -> memory for the pixels of an image, uint8 ``[H, W, 3]``, or ``[H, W, 4]`` with a byte of padding.
PixelMemory = Callable[[int, int], np.ndarray]


def with_padding(height: int, width: int) -> np.ndarray:
    """New memory, uint8 ``[H, W, 4]``, which what resizes on a CPU is fastest on: the usual :data:`PixelMemory`."""
    return np.empty((height, width, 4), dtype=np.uint8)


def decode_plain_jpeg(data: bytes, opened: Image.Image, memory: PixelMemory = with_padding) -> torch.Tensor | None:
    """Decode a JPEG that has nothing odd about it.

    Measured on 512-pixel photographs, from bytes to the model's view on one core: 1.83 -> 1.37 ms.

    Args:
        data: The file.
        opened: The same as Pillow has opened it, which has looked at its header and decoded nothing.
        memory: Gives the memory for the pixels.

    Returns:
        RGB pixels, uint8 ``[3 or 4, H, W]``, channels last in memory. None for what is left to Pillow: other formats,
        CMYK, and files that libjpeg-turbo warns of.
    """
    if opened.format != "JPEG" or opened.mode not in _PLAIN_MODES or not _pixels_are_pillows():
        return None
    # Of the size that was checked, whatever the decoder's own look at the header finds.
    return _decode(data, memory(opened.height, opened.width))


def _decode(data: bytes, pixels: np.ndarray) -> torch.Tensor | None:
    try:
        decoded = decode_jpeg(data, "RGBX"[: pixels.shape[2]], buffer=pixels, strict=True)
    except ValueError:
        return None
    return torch.from_numpy(decoded).permute(2, 0, 1) if decoded.shape == pixels.shape else None


@cache
def _pixels_are_pillows() -> bool:
    """Whether this decoder agrees with the libjpeg that Pillow was built with: others upsample colours differently."""
    ramp = np.arange(35, dtype=np.uint8) * 7
    image = Image.fromarray(np.stack(np.broadcast_arrays(ramp, ramp[:, None], ramp[::-1]), axis=-1))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75, subsampling="4:2:0")
    decoded = _decode(file.getvalue(), with_padding(image.height, image.width))
    return decoded is not None and np.array_equal(decoded.permute(1, 2, 0)[..., :3], np.asarray(Image.open(file)))
