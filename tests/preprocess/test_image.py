import io

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import functional as tvf

from clipfilter_wds.preprocess.image import IMAGE_FORMATS, ImageView, RgbImage
from tests.support.image_processors import (
    ClipByPillow,
    ClipByTensor,
    SiglipByPillow,
    SiglipByTensor,
    as_seen,
    options_of,
)
from tests.support.images import VIEW
from tests.support.toys import encoded, photo


def reference_view(image: Image.Image, view: ImageView) -> torch.Tensor:
    """What the library makes of an image before it rescales and normalises."""
    if view.resampler == "pillow":
        resize = transforms.Resize(view.resize, transforms.InterpolationMode(view.interpolation))
        return tvf.pil_to_tensor(transforms.CenterCrop(view.crop)(resize(image)))
    options = {"resample": Image.Resampling[view.interpolation.upper()], "do_rescale": False, "do_normalize": False}
    by_tensor = view.resampler == "torchvision"
    if isinstance(view.resize, tuple):
        height, width = view.resize
        squash = SiglipByTensor if by_tensor else SiglipByPillow
        processor = squash(size={"height": height, "width": width}, **options)
    else:
        shorten = ClipByTensor if by_tensor else ClipByPillow
        crop = {"height": view.crop[0], "width": view.crop[1]}
        processor = shorten(size={"shortest_edge": view.resize}, crop_size=crop, **options)
    return processor(as_seen(image), return_tensors="pt", **options_of(processor)).pixel_values[0]


def check_view(image: Image.Image, view: ImageView) -> None:
    found = view(RgbImage.of(image))
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    assert torch.equal(found, reference_view(image, view).to(torch.uint8))
    interleaved = torch.zeros(*view.crop, 4, dtype=torch.uint8).permute(2, 0, 1)
    assert torch.equal(view(RgbImage.of(image), interleaved), found)


# --- pixels ---


SIZES = [(48, 40), (40, 48), (1, 200), (200, 1), (1, 1), (5, 7), (32, 32), (31, 33), (33, 31), (640, 480), (2000, 2)]
# What is left over beside the crop: 1, 3, 5 and 7 pixels, which can't be shared out evenly.
SIZES += [(33, 32), (35, 32), (37, 32), (39, 32), (32, 35), (32, 39)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        VIEW,
        ImageView(resize=40, crop=(32, 32)),
        ImageView(resize=24, crop=(32, 32)),
        ImageView(resize=33, crop=(32, 20)),
        ImageView(resize=32, crop=(32, 32), interpolation="bilinear"),
        ImageView(resize=(32, 24), crop=(32, 24)),
        ImageView(resize=32, crop=(32, 32), resampler="pillow"),
        ImageView(resize=(32, 24), crop=(32, 24), resampler="pillow"),
        ImageView(resize=32, crop=(32, 32), resampler="pillow_floor"),
        ImageView(resize=33, crop=(32, 20), resampler="pillow_floor"),
        ImageView(resize=32, crop=(32, 32), interpolation="bilinear", resampler="pillow_floor"),
        ImageView(resize=(32, 24), crop=(32, 24), resampler="pillow_floor"),
    ],
    ids=[
        "model",
        "larger than the crop",
        "smaller than the crop",
        "oblong crop",
        "bilinear",
        "squashed",
        "pillow",
        "pillow, squashed",
        "pillow of transformers",
        "pillow of transformers, oblong crop",
        "pillow of transformers, bilinear",
        "pillow of transformers, squashed",
    ],
)
def test_pixels_equal_those_of_the_image_processor(size, view):
    check_view(photo(1, size), view)


@settings(max_examples=60)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(8, 64),
    st.integers(4, 64),
    st.integers(4, 64),
    st.sampled_from(["torchvision", "pillow_floor"]),
)
def test_pixels_equal_those_of_the_image_processor_at_any_size(width, height, resize, crop_height, crop_width, by):
    check_view(photo(2, (width, height)), ImageView(resize=resize, crop=(crop_height, crop_width), resampler=by))


@pytest.mark.parametrize("size", [(512, 384), (512, 512), (256, 256), (224, 224), (64, 64)], ids=str)
def test_pixels_equal_those_of_the_image_processor_at_the_size_of_real_models(size):
    check_view(photo(3, size), ImageView(resize=224, crop=(224, 224)))


@pytest.mark.parametrize("resampler", ["torchvision", "pillow"])
def test_pixels_equal_those_of_the_image_processor_of_an_image_in_several_pieces_of_memory(resampler):
    image = photo(4, (2300, 1900))
    with pytest.raises(ValueError, match="contiguous"):
        image.__arrow_c_array__()
    check_view(image, ImageView(resize=32, crop=(32, 32), resampler=resampler))


def with_alpha(mode: str) -> Image.Image:
    image = photo(1)
    image.putalpha(photo(2).convert("L"))
    return image.convert(mode)


MODES = {
    "rgb": encoded(photo(1), "PNG"),
    "grey": encoded(photo(1).convert("L"), "PNG"),
    "grey jpeg": encoded(photo(1).convert("L")),
    "one bit": encoded(photo(1).convert("1"), "PNG"),
    "palette": encoded(photo(1).quantize(16), "PNG"),
    "palette with a transparent colour": encoded(photo(1).quantize(16), "PNG", transparency=3),
    "palette with alphas": encoded(photo(1).quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "rgb with a transparent colour": encoded(photo(1).quantize(4).convert("RGB"), "PNG", transparency=(0, 0, 0)),
    "grey with a transparent level": encoded(photo(1).quantize(4).convert("L"), "PNG", transparency=7),
    "rgba": encoded(with_alpha("RGBA"), "PNG"),
    "grey and alpha": encoded(with_alpha("LA"), "PNG"),
    "rgba webp": encoded(with_alpha("RGBA"), "WEBP", lossless=True),
    "cmyk": encoded(photo(1).convert("CMYK")),
    "cmyk tiff": encoded(photo(1).convert("CMYK"), "TIFF"),
    "ycbcr tiff": encoded(photo(1).convert("YCbCr"), "TIFF"),
    "lab tiff": encoded(photo(1).convert("LAB"), "TIFF"),
    "32-bit tiff": encoded(photo(1).convert("I"), "TIFF"),
    "float tiff": encoded(photo(1).convert("F"), "TIFF"),
    "gif with transparency": encoded(photo(1).quantize(8), "GIF", transparency=2),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_rgb_that_the_reference_makes_of_it(mode):
    try:
        reference = Image.open(io.BytesIO(MODES[mode])).convert("RGB")
    except OSError:  # as 11.3 can't, of YCbCr
        pytest.skip("this Pillow can't read what it writes")
    image = VIEW.decode(MODES[mode]).image
    assert image.mode == "RGB"
    assert torch.equal(VIEW(RgbImage.of(image)), reference_view(reference, VIEW).to(torch.uint8))


LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "PPM": {}, "WEBP": {"lossless": True}, "JPEG2000": {}, "DIB": {}}


@pytest.mark.parametrize("image_format", [*LOSSLESS, "JPEG", "GIF", "AVIF"])
def test_every_allowed_format_is_decoded(image_format):
    image = VIEW.decode(encoded(photo(1), image_format, **LOSSLESS.get(image_format, {}))).image
    error = np.abs(np.asarray(image).astype(int) - np.asarray(photo(1)))
    assert error.mean() < 12
    if image_format in LOSSLESS:
        assert not error.any()
    assert image_format in IMAGE_FORMATS


@pytest.mark.parametrize(
    ("image_format", "byte_order"), [("PNG", "<"), ("PNG", ">"), ("TIFF", "<"), ("TIFF", ">"), ("PPM", "<")]
)
def test_16_bit_grey_is_scaled_to_8_bits_and_not_saturated(image_format, byte_order):
    levels = np.linspace(0, 65535, 48 * 40).astype(np.uint16).reshape(40, 48)
    image = Image.frombytes(f"I;16{'B' if byte_order == '>' else ''}", (48, 40), levels.astype(f"{byte_order}u2"))
    decoded = np.asarray(VIEW.decode(encoded(image, image_format)).image)
    expected = np.round(levels / 257).astype(np.uint8)
    assert np.array_equal(decoded, np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_seen(image_format):
    red, blue = Image.new("RGB", (48, 40), "red"), Image.new("RGB", (48, 40), "blue")
    data = encoded(red, image_format, save_all=True, append_images=[blue])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    pixel = VIEW.decode(data).image.getpixel((20, 20))
    assert pixel[0] > 240 > 15 > pixel[2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = VIEW.decode(encoded(photo(1), quality=90, exif=exif)).image
    assert turned.size == (48, 40)
    assert turned.tobytes() == VIEW.decode(encoded(photo(1), quality=90)).image.tobytes()
