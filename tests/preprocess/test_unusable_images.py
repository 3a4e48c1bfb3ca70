"""Images that are dropped, each for its reason."""

import pickle
import struct

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.types import DropReason, UnusableError
from tests.support.images import VIEW, png_header, reason_of
from tests.support.toys import encoded, photo

NO_IMAGES = {
    "nothing": b"",
    "text": b"a photo of a cat",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "pickle": pickle.dumps(photo(1)),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(evil) run\n",
    "photoshop": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x09\0\0\0\x09\0\x08\0\3" + bytes(500),
    "windows metafile": b"\xd7\xcd\xc6\x9a\0\0" + bytes(100),
    "jpeg magic alone": b"\xff\xd8\xff\xe0",
    "png magic alone": b"\x89PNG\r\n\x1a\n",
}

OTHER_FORMATS = ["EPS", "ICO", "PCX", "TGA", "SGI", "DDS", "IM", "PDF", "ICNS", "QOI", "BLP", "XBM", "MSP", "SPIDER"]
MODE_OF_FORMAT = {"XBM": "1", "MSP": "1", "SPIDER": "F", "BLP": "P", "ICNS": "RGBA"}


@pytest.mark.parametrize("data", NO_IMAGES.values(), ids=NO_IMAGES)
def test_what_is_no_image_is_unreadable(data):
    assert reason_of(VIEW.decode, data) is DropReason.UNREADABLE_IMAGE


@pytest.mark.parametrize("image_format", OTHER_FORMATS)
def test_formats_outside_the_allow_list_are_never_opened(image_format):
    data = encoded(photo(1).convert(MODE_OF_FORMAT.get(image_format, "RGB")), image_format)
    assert reason_of(VIEW.decode, data) is DropReason.UNREADABLE_IMAGE


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_unreadable(image_format, share):
    data = encoded(photo(1, (200, 150)), image_format)
    assert reason_of(VIEW.decode, data[: int(share * len(data))]) is DropReason.UNREADABLE_IMAGE


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG that declares another size than it has."""
    data = bytearray(encoded(photo(1)))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_header(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\0\0\0,"
        + struct.pack("<HHHH", 0, 0, width, height)
        + b"\0\x08"
    )


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


BOMBS = {
    # The pixels are not there: had they been looked for, the image would be unreadable.
    "png": png_header(100_000, 100_000),
    "png between Pillow's warning and its error": png_header(10_000, 9_000),
    "png of the largest size": png_header(2**31 - 1, 2**31 - 1),
    "jpeg": jpeg_header(65_500, 65_500),
    "gif": gif_header(65_535, 65_535),
    "bmp": bmp_header(50_000, 50_000),
    "ppm": b"P6 60000 60000 255\n",
    "thin": png_header(1, 10_000_000),
    "flat": png_header(10_000_000, 1),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_an_image_that_declares_too_many_pixels_is_too_large_and_not_decoded(data):
    assert reason_of(VIEW.decode, data) is DropReason.IMAGE_TOO_LARGE


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_the_cap_on_pixels_counts_width_times_height(image_format):
    data = encoded(photo(1, (48, 40)), image_format)
    at_cap = ImageView(resize=32, crop=(32, 32), max_pixels=48 * 40)
    assert at_cap.decode(data).image.size == (48, 40)
    below = ImageView(resize=32, crop=(32, 32), max_pixels=48 * 40 - 1)
    assert reason_of(below.decode, data) is DropReason.IMAGE_TOO_LARGE


IMAGES = [encoded(photo(1), name) for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")]


@settings(max_examples=300)
@given(
    st.sampled_from(range(len(IMAGES))),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_a_damaged_image_is_rgb_or_has_a_reason_and_never_another_exception(number, changes):
    data = bytearray(IMAGES[number])
    for share, value in changes:
        data[int(share * len(data))] = value
    try:
        image = VIEW.decode(bytes(data)).image
    except UnusableError as unusable:
        assert unusable.reason in (DropReason.UNREADABLE_IMAGE, DropReason.IMAGE_TOO_LARGE)  # noqa: PT017  # need not be
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= VIEW.max_pixels
