"""JPEGs decoded without Pillow have Pillow's pixels, or are left to Pillow."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipfilter_wds.preprocess.image import IMAGE_FORMATS, ImageView
from clipfilter_wds.preprocess.jpeg import decode_plain_jpeg
from clipfilter_wds.types import UnusableError

VIEW = ImageView(resize=32, crop=(32, 32))


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Slopes with some grain."""
    down, right = np.mgrid[:height, :width]
    slopes = np.stack([3 * down + right, down + 5 * right, 255 - 2 * down - right], axis=-1)
    grain = np.random.default_rng(seed).integers(0, 40, slopes.shape)
    return Image.fromarray(((slopes + grain) % 256).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def open_file(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)


def decode(data: bytes) -> torch.Tensor | None:
    return decode_plain_jpeg(data, open_file(data))


def by_pillow(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(open_file(data).convert("RGB"))).permute(2, 0, 1)


@st.composite
def jpegs(draw: st.DrawFn) -> bytes:
    side = st.integers(1, 70)
    image = picture(draw(side), draw(side), draw(st.sampled_from(["RGB", "RGB", "L"])), draw(st.integers(0, 99)))
    options = {"progressive": draw(st.booleans()), "restart_marker_blocks": draw(st.sampled_from([0, 0, 3]))}
    if image.mode == "RGB":
        options["subsampling"] = draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]))
    return jpeg(image, quality=draw(st.integers(1, 100)), **options)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(jpegs()))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data) - 1))
        length = draw(st.sampled_from([0, 1, 2, 20]))
        data[place : place + length] = draw(st.sampled_from([b"", b"\0", b"\xff\xd9", b"\xff\xda", b"\x7f" * 30]))
    return bytes(data[: draw(st.integers(1, 2 * len(data)))])


@given(data=jpegs())
@settings(max_examples=150)
def test_plain_jpegs_have_pillows_pixels(data):
    decoded = decode(data)
    assert decoded is not None
    assert torch.equal(decoded[:3], by_pillow(data))


@given(data=damaged())
@settings(max_examples=400)
def test_what_is_decoded_of_damaged_jpegs_has_pillows_pixels(data):
    try:
        opened = open_file(data)
    except (OSError, ValueError, SyntaxError):
        return
    if opened.width * opened.height < 10**6 and (decoded := decode_plain_jpeg(data, opened)) is not None:
        assert torch.equal(decoded[:3], by_pillow(data))


@pytest.mark.parametrize("damage", [b"\xff\xd9\0\0", b"\xff\xff\xff\xff\xff"])
def test_damaged_data_is_left_to_pillow_and_nothing_is_printed(damage, capfd):
    data = bytearray(jpeg(picture(90, 90)))
    data[-400 : -400 + len(damage)] = damage
    assert decode(bytes(data)) is None
    assert capfd.readouterr() == ("", "")


def test_a_jpeg_that_is_cut_short_is_unreadable():
    data = jpeg(picture(90, 90))
    for end in (len(data) // 2, len(data) - 20):
        with pytest.raises(UnusableError, match="unreadable_image"):
            VIEW.decode(data[:end])


def test_other_formats_and_four_colours_are_left_to_pillow():
    frames = io.BytesIO()
    picture(20, 20).save(frames, "MPO", save_all=True, append_images=[picture(20, 20)])
    png = io.BytesIO()
    picture(20, 20).save(png, "PNG")
    for data in (frames.getvalue(), png.getvalue(), jpeg(picture(20, 20, "CMYK"))):
        assert decode(data) is None
        assert torch.equal(VIEW.decode(data).pixels[:3], by_pillow(data))


def test_another_size_than_the_header_that_was_checked_is_left_to_pillow():
    small, large = jpeg(picture(20, 20)), jpeg(picture(40, 30))
    assert decode_plain_jpeg(small, open_file(large)) is None
    assert decode_plain_jpeg(large, open_file(small)) is None


def test_a_libjpeg_of_pillows_that_upsamples_otherwise_keeps_the_work(monkeypatch):
    data = jpeg(picture(40, 30))
    monkeypatch.setattr("clipfilter_wds.preprocess.jpeg._pixels_are_pillows", lambda: False)
    assert decode(data) is None
    assert isinstance(VIEW.decode(data).decoded, Image.Image)


def test_trainings_transform_gets_the_image_with_its_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    data = jpeg(picture(40, 30), exif=exif)
    rgb = VIEW.decode(data)
    assert isinstance(rgb.decoded, torch.Tensor)
    found, expected = rgb.image, open_file(data)
    assert (found.mode, found.size, found.tobytes()) == ("RGB", (40, 30), expected.tobytes())
    assert dict(found.getexif()) == dict(expected.getexif()) == {0x0112: 6}
    found.putpixel((0, 0), (1, 2, 3))  # it is the transform's own
    assert torch.equal(rgb.pixels[:3], by_pillow(data))
