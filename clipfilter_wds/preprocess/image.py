"""Decodes images, and resizes and crops them to what CLIP sees."""

import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor
from threading import Lock
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.dlpack import from_dlpack
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from clipfilter_wds.preprocess.jpeg import PixelMemory, decode_plain_jpeg, with_padding
from clipfilter_wds.types import DropReason, UnusableError

#: Pillow's names of the formats that are ever opened. None of them starts a program or runs a script.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

#: What resizes, and how it rounds an odd margin. (One is negative where the crop is larger, and padded.)
Resampler = Literal["torchvision", "pillow", "pillow_floor"]
_ROUND_MARGINS: dict[Resampler, Callable[[float], int]] = {"torchvision": int, "pillow": round, "pillow_floor": floor}

#: Images that grow past this many pixels when their short side is resized (1 x 65000) are too large, like bombs are.
_MAX_RESIZED_PIXELS = 1 << 28


class _WithoutWarnings:
    """Silences Pillow's warnings of odd files while any thread decodes; what becomes of these is counted instead.

    One for all threads: of two with a ``warnings.catch_warnings`` each, the last to end would restore the filters that
    the other had set.
    """

    def __init__(self) -> None:
        self._lock, self._num_inside = Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._num_inside += 1
            if self._num_inside == 1:
                self._caught = warnings.catch_warnings(action="ignore")
                self._caught.__enter__()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._caught.__exit__(None, None, None)


_without_warnings = _WithoutWarnings()
# A thread of the parent may hold the lock while a worker is forked.
os.register_at_fork(after_in_child=_without_warnings.__init__)  # type: ignore[misc]  # as if it were new


@contextmanager
def _reasons() -> Iterator[None]:
    """Turns what decoders raise into reasons."""
    try:
        yield
    except UnusableError:
        raise
    except Image.DecompressionBombError:
        raise UnusableError(DropReason.IMAGE_TOO_LARGE) from None
    except Exception as error:  # decoders fail with any type there is
        raise UnusableError(DropReason.UNREADABLE_IMAGE) from error


class RgbImage(NamedTuple):
    """An RGB image, and its width and height as stored, in pixels.

    With ``fast_decode`` it may be decoded at 1 / ``scale`` of that, rounded up: its last row and column are cut ones.

    Attributes:
        decoded: As Pillow has it, or uint8 ``[3 or 4, H, W]``, channels last in memory, a fourth being padding.
        width: As stored.
        height: As stored.
        scale: What both were divided by.
        info: What Pillow found beside the pixels: EXIF, colour profile, ...
    """

    decoded: Image.Image | torch.Tensor
    width: int
    height: int
    scale: int = 1
    info: Mapping[Any, Any] = MappingProxyType({})

    @classmethod
    def of(cls, image: Image.Image) -> Self:
        """An image that was decoded elsewhere."""
        return cls(_to_rgb(image), *image.size)

    @property
    def image(self) -> Image.Image:
        """As Pillow has it."""
        if isinstance(self.decoded, Image.Image):
            return self.decoded
        pixels = self.decoded.permute(1, 2, 0).numpy()
        image = Image.frombytes("RGB", pixels.shape[1::-1], pixels, "raw", "RGBX"[: pixels.shape[2]])
        image.info = dict(self.info)
        return image

    @property
    def pixels(self) -> torch.Tensor:
        """uint8 ``[3 or 4, H, W]``, of which the first three are red, green and blue."""
        return _pixels(self.decoded) if isinstance(self.decoded, Image.Image) else self.decoded


class Resizing(NamedTuple):
    """How a decoded image becomes a view.

    Attributes:
        source: Height and width that are resized, in pixels; of an image at a reduced size, no whole numbers.
        size: Height and width after resizing, in pixels.
        corner: Top and left of the crop in that; negative where the view is larger, which is black there.
    """

    source: tuple[float, float]
    size: tuple[int, int]
    corner: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageView:
    """How an image becomes the model's input: resized and centre cropped, both in uint8.

    The pixels equal those of ``transformers``' ``CLIPImageProcessor`` (or the model's own) before it rescales and
    normalises, unless ``fast_decode`` is on.

    Attributes:
        resize: Length of the shortest edge after resizing, in pixels; or height and width, whatever the image's own.
        crop: Height and width of the centre crop, in pixels.
        interpolation: torchvision's name of the resampling; antialiased.
        resampler: ``torchvision``, which resizes tensors, as transformers does; ``pillow``, as open_clip does; or
            ``pillow_floor``, as transformers 4 does.
        max_pixels: An image whose header declares more is dropped as ``image_too_large`` and not decoded.
        fast_decode: Decode a JPEG at a half, a quarter or an eighth of its size where that is not below ``resize``.
        resize_on_device: Leave it to the device to resize what is to be scored; see ``ImagePacker``.

    Raises:
        ValueError: When the device can't resize so.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int]
    interpolation: str = "bicubic"
    resampler: Resampler = "torchvision"
    max_pixels: int = 89_478_485  # Pillow's own limit
    fast_decode: bool = False
    resize_on_device: bool = False

    def __post_init__(self) -> None:
        if self.resize_on_device and self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f"resize_on_device is for bilinear and bicubic resizing, and this model's is {self.interpolation}: "
                "leave resize_on_device out"
            )

    @classmethod
    def from_fingerprint(cls, fingerprint: Mapping[str, Any]) -> Self:
        """The view that scores of this fingerprint were made with."""
        resize = fingerprint["resize"]
        return cls(
            resize=resize if isinstance(resize, int) else tuple(resize),
            crop=tuple(fingerprint["crop"]),
            interpolation=fingerprint["interpolation"],
            resampler=fingerprint["resampler"],
            max_pixels=fingerprint["max_pixels"],
            fast_decode=fingerprint["fast_decode"],
        )

    def decode(self, data: bytes, memory: PixelMemory = with_padding) -> RgbImage:
        """The first frame of an encoded image, as RGB.

        Args:
            data: The file.
            memory: Gives the memory that it is decoded to, unless that is Pillow's.

        Raises:
            UnusableError: ``unreadable_image`` or ``image_too_large``.
        """
        with _without_warnings, _reasons():
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            width, height = image.size
            self._check_size(width, height)
            drafted = image.draft(None, self._smallest) if self.fast_decode else None  # None of all but JPEGs
            scale = 1 if drafted is None else round(width / drafted[1][2])
            pixels = decode_plain_jpeg(data, image, memory) if scale == 1 else None
            return RgbImage(_to_rgb(image) if pixels is None else pixels, width, height, scale, image.info)

    def convert(self, image: Image.Image) -> RgbImage:
        """An image that Pillow has opened, as RGB; raises as :meth:`decode`."""
        with _without_warnings, _reasons():
            self._check_size(*image.size)
            return RgbImage.of(image)

    def __call__(self, rgb: RgbImage, out: torch.Tensor | None = None) -> torch.Tensor:
        """Resize and crop to uint8 ``[3, crop_height, crop_width]``.

        Written to ``out`` if that is given, which may have a fourth channel, of padding.
        """
        source, size, (top, left) = self.resizing(rgb)
        if self.resampler != "torchvision":
            box = (0, 0, *source[::-1])
            pixels = _pixels(rgb.image.resize(size[::-1], Image.Resampling[self.interpolation.upper()], box))
        elif rgb.scale == 1 or self.interpolation not in ("bilinear", "bicubic"):
            if out is not None and size == self.crop and _resized_into(out, rgb.pixels, self.interpolation):
                return out[:3]
            interpolation = InterpolationMode(self.interpolation)
            pixels = tvf.resize(rgb.pixels, list(size), interpolation, antialias=True)
        else:
            factors = [to / of for to, of in zip(size, source, strict=True)]
            reduced = rgb.pixels[None]
            pixels = interpolate(reduced, scale_factor=factors, mode=self.interpolation, antialias=True)[0]
        view: torch.Tensor = tvf.crop(pixels, top, left, *self.crop)
        if out is None:
            return view[:3].contiguous()
        out[: len(view)].copy_(view[: len(out)])  # all four channels of both are copied as fast as memory allows
        return out[:3]

    def resizing(self, rgb: RgbImage) -> Resizing:
        """How an image is resized and cropped."""
        size = self._resized(rgb.width, rgb.height)
        whole = _ROUND_MARGINS[self.resampler]
        top, left = (whole((side - cropped) / 2) for side, cropped in zip(size, self.crop, strict=True))
        source = (rgb.height / rgb.scale, rgb.width / rgb.scale)
        if rgb.scale > 1 and self.resampler == "torchvision":
            # torch rounds the size of the output down, which must not make it a pixel less.
            source = (source[0] * size[0] / (size[0] + 1 / 64), source[1] * size[1] / (size[1] + 1 / 64))
        return Resizing(source, size, (top, left))

    @property
    def _smallest(self) -> tuple[int, int]:
        """The width and height below which no image is decoded."""
        return self.resize[::-1] if isinstance(self.resize, tuple) else (self.resize, self.resize)

    def _check_size(self, width: int, height: int) -> None:
        resized_height, resized_width = self._resized(width, height)
        if width * height > self.max_pixels or resized_height * resized_width > _MAX_RESIZED_PIXELS:
            raise UnusableError(DropReason.IMAGE_TOO_LARGE)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Height and width."""
        if isinstance(self.resize, tuple):
            return self.resize
        long = int(self.resize * max(width, height) / min(width, height))
        return (long, self.resize) if width <= height else (self.resize, long)


def _resized_into(out: torch.Tensor, pixels: torch.Tensor, interpolation: str) -> bool:
    """Resize straight into ``out``, all of it, and say whether that could be done. Both are channels last in memory.

    It is what ``tvf.resize`` calls, which takes no memory to write to; so it spares a copy: with square images of 256
    pixels 12 % of a worker's time, with 512 pixels 6 %.
    """
    if interpolation != "bicubic" or not len(pixels) == len(out) == 4 or pixels.shape == out.shape:
        return False
    resize = torch.ops.aten._upsample_bicubic2d_aa.out
    resize(pixels[None], list(out.shape[1:]), False, None, None, out=out[None])
    return True


def _pixels(rgb: Image.Image) -> torch.Tensor:
    """An RGB image's pixels, uint8 ``[3 or 4, H, W]``: if possible Pillow's own memory, whose fourth byte is padding.

    Channels-last, the layout that the antialiasing kernel is fastest on; it is faster on four channels than on three.
    """
    height, width = rgb.height, rgb.width
    try:
        pixels = from_dlpack(pa.array(rgb).flatten()).view(height, width, 4)
    except ValueError:  # an image of more than 16 MiB lies in several pieces of memory
        pixels = torch.from_numpy(np.array(rgb))
    return pixels.permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow's convert saturates 16-bit greyscale to white; its own 8 high bits are the image.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.array(image, dtype=np.uint32)
        grey += 128  # in place, as this may be an image of the largest size
        grey //= 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    image.load()
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    if rgb.info.get("transparency") is None:
        return rgb
    # Pillow keeps a transparent colour (of a palette, or PNG's tRNS) beside the pixels, and CLIPImageProcessor puts
    # such an image on white. An alpha channel, in contrast, is gone after convert.
    white = Image.new("RGBA", rgb.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgb.convert("RGBA")).convert("RGB")
