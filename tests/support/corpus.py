"""Makes images of every kind that breaks decoders, each with what must become of it."""

import base64
import io
import pickle
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageCms

from clipfilter_wds.preprocess.image import IMAGE_FORMATS
from clipfilter_wds.types import DropReason
from tests.support.toys import encoded, photo

#: ``as_reference``: what the plain loop makes of it.
Outcome = Literal["scored", "as_reference"] | DropReason

UNREADABLE, TOO_LARGE = DropReason.UNREADABLE_IMAGE, DropReason.IMAGE_TOO_LARGE
EXTENSIONS = {
    "JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "DIB": "bmp", "GIF": "gif", "TIFF": "tiff", "PPM": "ppm",
    "JPEG2000": "jp2", "AVIF": "avif",
}  # fmt: skip
#: Formats that Pillow reads and this package never opens.
OTHER_FORMATS = {"EPS": "RGB", "PDF": "RGB", "ICO": "RGB", "PCX": "RGB", "TGA": "RGB", "SGI": "RGB", "DDS": "RGB"}
OTHER_FORMATS |= {"IM": "RGB", "QOI": "RGB", "XBM": "1", "MSP": "1", "SPIDER": "F", "BLP": "P", "ICNS": "RGBA"}

# Made with libjpeg-turbo's `cjpeg -arithmetic` and `cjpeg -arithmetic -progressive`, since Pillow can't write these.
_ARITHMETIC = """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpR
Uk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//yQARCAAUABgDASIAAhEB
AxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDSaFDLueOPJB3qnWbexiNRaxuDvQ9aXmKMQL3z2at8OObFDfdruv67/vh650zUkzGN3ROt4wtwonGh
znewYaan+4heW7l4iA3TH301HXE5RRlZGOmb6wcAW9z+RNcxU8/UohEnbjX3cdkkXhFUN4jEVe2EJnrGGkTl5iKI/9k=
"""
_ARITHMETIC_PROGRESSIVE = """
/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpR
Uk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT0//ygARCAAUABgDASIAAhEB
AxEB/8wABgAQARD/2gAMAwEAAhADEAAAAdHex4mjJWXCDEYvZvFvk8B8L4D/zAAEEAX/2gAIAQEAAQUCD7DbsDNsjwaptvtEqeIpOHf2CP/MAAQRBf/a
AAgBAwEBPwE+iOGarx4z2Sf6sZb/zAAEEQX/2gAIAQIBAT8BGulDfC98Dqp7FyNG/Kp42P/MAAQQBf/aAAgBAQAGPwLQSP/MAAQQBf/aAAgBAQABPyEU
FF8eDzAUjWWe1NlA/9oADAMBAAIAAwAAABByASj/zAAEEQX/2gAIAQMBAT8QsA/6vkt8/8wABBEF/9oACAECAQE/ELHv6aswP8RA/8wABBAF/9oACAEB
AAE/EO90KC+oYDq7r7AyE1FJhmfS/GfO2P/Z
"""


@dataclass(frozen=True, kw_only=True)
class BadImage:
    """An image file, the extension that it comes with, and what must become of it."""

    name: str
    data: bytes
    outcome: Outcome
    extension: str = "jpg"


def corpus() -> list[BadImage]:
    """All of them; the same bytes each time."""
    kinds = (_whole, _modes, _jpegs, _animations, _metadata, _sizes, _cut, _flipped, _no_images, bombs)
    return [image for kind in kinds for image in kind()]


# --- what is odd, but an image ---


def _whole() -> Iterator[BadImage]:
    for number, name in enumerate(IMAGE_FORMATS):
        data = encoded(photo(number), name)
        yield BadImage(name=f"{name}", data=data, outcome="scored", extension=EXTENSIONS[name])
        wrong = "png" if name != "PNG" else "jpg"
        yield BadImage(name=f"{name} called {wrong}", data=data, outcome="scored", extension=wrong)


def _modes() -> Iterator[BadImage]:
    image, alpha = photo(1), photo(2).convert("L")
    rgba, la = image.copy(), image.convert("L")
    rgba.putalpha(alpha)
    la.putalpha(alpha)
    grey16 = Image.fromarray(np.linspace(0, 65535, 48 * 40).astype(np.uint16).reshape(40, 48))
    modes = {
        "1 bit": image.convert("1"),
        "grey": image.convert("L"),
        "grey and alpha": la,
        "RGBA": rgba,
        "palette": image.quantize(16),
        "16-bit grey": grey16,
    }
    for name, mode in modes.items():
        yield BadImage(name=f"PNG {name}", data=encoded(mode, "PNG"), outcome="scored", extension="png")
    for name in ("CMYK", "YCbCr", "LAB", "I", "F", "I;16"):
        tiff = encoded(grey16 if name == "I;16" else image.convert(name), "TIFF")
        yield BadImage(name=f"TIFF {name}", data=tiff, outcome="scored", extension="tif")
    for name, transparency in (("colour", 3), ("alphas", bytes(range(0, 256, 16)))):
        data = encoded(image.quantize(16), "PNG", transparency=transparency)
        yield BadImage(name=f"PNG palette with transparent {name}", data=data, outcome="scored", extension="png")
    yield BadImage(name="PNG 16-bit RGB", data=png(8, 8, bit_depth=16), outcome="scored", extension="png")


def _jpegs() -> Iterator[BadImage]:
    cmyk = encoded(photo(1).convert("CMYK"))
    ycck = bytearray(cmyk)
    ycck[cmyk.index(b"Adobe") + 11] = 2  # the colour transform
    jpegs = {
        "CMYK": cmyk,
        "YCCK": bytes(ycck),
        "grey": encoded(photo(1).convert("L")),
        "progressive": encoded(photo(1), progressive=True),
        "of quality 1": encoded(photo(1), quality=1),
        "arithmetic": base64.b64decode(_ARITHMETIC),
        "arithmetic progressive": base64.b64decode(_ARITHMETIC_PROGRESSIVE),
        "with garbage after its end": encoded(photo(1)) + bytes(1000),
        "with another behind it": encoded(photo(1)) + encoded(photo(2)),
    }
    for name, data in jpegs.items():
        yield BadImage(name=f"JPEG {name}", data=data, outcome="scored")


def _animations() -> Iterator[BadImage]:
    frames = [photo(seed) for seed in range(3)]
    for name in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        data = encoded(frames[0], name, save_all=True, append_images=frames[1:])
        yield BadImage(name=f"animated {name}", data=data, outcome="scored", extension=EXTENSIONS[name])


def _metadata() -> Iterator[BadImage]:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {
        "rotated EXIF": {"exif": exif},
        "garbage for EXIF": {"exif": b"Exif\0\0" + bytes(range(256))},
        "EXIF that points behind its end": {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"},
        "EXIF that points to itself": {
            "exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\0\0\0\0"
        },
        "a profile": {"icc_profile": profile},
        "half a profile": {"icc_profile": profile[: len(profile) // 2]},
        "garbage for a profile": {"icc_profile": bytes(range(256)) * 4},
    }
    for name in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        for what, option in options.items():
            if name in ("TIFF", "AVIF") and isinstance(option.get("exif"), bytes):
                continue  # their encoders refuse these
            data = encoded(photo(1), name, **option)
            yield BadImage(name=f"{name} with {what}", data=data, outcome="scored", extension=EXTENSIONS[name])
    text = b"tEXt" + b"Comment\0" + b"x" * 1000
    broken = _png_with(b"tEXt" + bytes(4), encoded(photo(1), "PNG"))
    yield BadImage(name="PNG with text", data=_png_with(text, encoded(photo(1), "PNG")), outcome="scored")
    yield BadImage(name="PNG with a broken text", data=broken, outcome="as_reference")
    bomb = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(64 << 20), 9)
    yield BadImage(name="PNG with a text bomb", data=_png_with(bomb, encoded(photo(1), "PNG")), outcome="as_reference")
    bomb = b"iCCP" + b"icc\0\0" + zlib.compress(bytes(64 << 20), 9)
    yield BadImage(
        name="PNG with a profile bomb", data=_png_with(bomb, encoded(photo(1), "PNG")), outcome="as_reference"
    )


def _png_with(chunk: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk, behind its header."""
    return data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def _sizes() -> Iterator[BadImage]:
    # The last ones become 32 x 2,080,000 for a model of 32 pixels, and would be too large for one of 224.
    for width, height in ((1, 1), (2, 1), (1, 300), (300, 1), (2000, 2), (1, 65_000), (65_000, 1)):
        image = photo(1, (width, height))
        yield BadImage(name=f"{width} x {height}", data=encoded(image, "PNG"), outcome="scored", extension="png")


# --- what is damaged ---


def _cut() -> Iterator[BadImage]:
    for number, name in enumerate(IMAGE_FORMATS):
        data = encoded(photo(number, (120, 90)), name)
        for share in (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
            part = data[: int(share * len(data))]
            # Some formats end with what no decoder needs, so it is Pillow that says what is whole.
            outcome: Outcome = UNREADABLE if share < 0.5 else "as_reference"
            yield BadImage(name=f"{name} cut at {share:.0%}", data=part, outcome=outcome, extension=EXTENSIONS[name])
        zeroed = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
        name_of = f"{name} with its second half zeroed"
        yield BadImage(name=name_of, data=zeroed, outcome="as_reference", extension=EXTENSIONS[name])


def _flipped() -> Iterator[BadImage]:
    rng = random.Random(0)
    for number, name in enumerate(IMAGE_FORMATS):
        whole = encoded(photo(number), name)
        for flip in range(20):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 1, 3, 10))):
                # Half of them in the header, where most harm is done.
                data[rng.randrange(len(data) if flip % 2 else min(64, len(data)))] ^= rng.randrange(1, 256)
            name_of = f"{name} flipped {flip}"
            yield BadImage(name=name_of, data=bytes(data), outcome="as_reference", extension=EXTENSIONS[name])


# --- what is no image, or none to be opened ---


def _no_images() -> Iterator[BadImage]:
    data = {
        "nothing": b"",
        "one byte": b"\xff",
        "zeros": bytes(5000),
        "text": b"a photo of a cat",
        "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        "a pickle": pickle.dumps(photo(1)),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(evil) run\n",
        "Photoshop": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x09\0\0\0\x09\0\x08\0\3" + bytes(500),
        "a zip": b"PK\3\4" + bytes(100),
        "an executable": b"\x7fELF" + bytes(100),
        "a video": b"\0\0\0\x18ftypmp42" + bytes(100),
        "a pickled array": b"\x93NUMPY\x01\x00" + bytes(100),
    }
    for name, content in data.items():
        yield BadImage(name=name, data=content, outcome=UNREADABLE)
    for name, mode in OTHER_FORMATS.items():
        yield BadImage(name=name, data=encoded(photo(1).convert(mode), name), outcome=UNREADABLE)


# --- images that declare more pixels than anybody wants ---


def bombs() -> Iterator[BadImage]:
    """Small files that declare huge images; the pixels are there, or would be taken for there by a decoder."""
    # Just above this package's limit, of which Pillow itself would only warn; and far above.
    for width, height in ((10_000, 9_000), (16_383, 16_383)):
        declared = {
            "png": png(width, height, rows=height if width == 10_000 else 0),
            "gif": gif(width, height),
            "tiff": tiff(width, height),
            "webp": webp(width, height),
            "bmp": bmp(width, height),
            "ppm": b"P6 %d %d 255\n" % (width, height),
        }
        for extension, data in declared.items():
            name = f"{extension} bomb of {width} x {height}"
            yield BadImage(name=name, data=data, outcome=TOO_LARGE, extension=extension)
    yield BadImage(name="PNG of the largest size", data=png(2**31 - 1, 2**31 - 1, rows=0), outcome=TOO_LARGE)
    yield BadImage(name="thin PNG", data=png(1, 10_000_000, rows=0), outcome=TOO_LARGE, extension="png")
    yield BadImage(name="GIF of the largest size", data=gif(65_535, 65_535), outcome=TOO_LARGE, extension="gif")


def png(width: int, height: int, *, bit_depth: int = 8, rows: int | None = None) -> bytes:
    """A black PNG; its pixels are there, in about two hundredths of their size, unless there are fewer ``rows``."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, 2, 0, 0, 0)
    packer = zlib.compressobj(1)
    row = bytes(1 + 3 * width * bit_depth // 8) if rows != 0 else b""
    pixels = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def gif(width: int, height: int) -> bytes:
    """A GIF of one pixel that declares more."""
    size = struct.pack("<HH", width, height)
    return b"GIF89a" + size + b"\x80\0\0" + bytes(6) + b"," + bytes(4) + size + b"\0\x02\x02D\x01\0;"


def tiff(width: int, height: int) -> bytes:
    """A grey TIFF with one strip of zeros that declares more."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, 1000)]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + directory + bytes(4)).ljust(200, b"\0") + bytes(1000)


def webp(width: int, height: int) -> bytes:
    """A lossless WebP of one colour; all its pixels are there, in some bytes."""
    # Signature, size, no alpha, version 0; no transform, no colour cache, no meta codes; five codes of one symbol each.
    bits = [(0x2F, 8), (width - 1, 14), (height - 1, 14), (0, 1), (0, 3), (0, 1), (0, 1), (0, 1)]
    for symbol in (0, 128, 64, 255, 0):
        bits += [(1, 1), (0, 1), (1, 1), (symbol, 8)]
    value = sum(number << sum(size for _, size in bits[:at]) for at, (number, _) in enumerate(bits))
    data = value.to_bytes((sum(size for _, size in bits) + 7) // 8 + 2, "little")
    data += bytes(len(data) % 2)
    chunk = b"VP8L" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def bmp(width: int, height: int) -> bytes:
    """A BMP with no pixels."""
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def reference_reason(data: bytes, max_pixels: int = 89_478_485) -> DropReason | None:
    """What the plain loop finds wrong with an image of the formats that are opened, and of a size that is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > max_pixels:
            return TOO_LARGE
        image.convert("RGB")
    except Image.DecompressionBombError:
        return TOO_LARGE
    except Exception:  # noqa: BLE001  # as the reference does
        return UNREADABLE
    return None
