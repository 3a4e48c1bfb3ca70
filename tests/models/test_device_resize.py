"""The device resizes to the pixels that a CPU resizes to, whatever else is in the batch, or torch was told."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from PIL import Image

from clipfilter_wds.models import device_resize
from clipfilter_wds.models.device_resize import resize_packed, views_on_device
from clipfilter_wds.preprocess.batch import new_buffer
from clipfilter_wds.preprocess.image import ImageView, RgbImage
from clipfilter_wds.preprocess.packed import MOST_PIXELS, ImagePacker, PackedImages
from tests.support.fake_gpu import GPU, on_fake_gpu
from tests.support.toys import encoded, photo

CLIP = ImageView(resize=224, crop=(224, 224))
VIEWS = {
    "clip": CLIP,
    "squashed": replace(CLIP, resize=(64, 48), crop=(64, 48)),
    "bilinear": replace(CLIP, interpolation="bilinear"),
    "larger than the crop": replace(CLIP, resize=256),
    "smaller than the crop": replace(CLIP, resize=96, crop=(97, 100)),
}
RESIZED_BY_PILLOW = ["clip", "squashed", "larger than the crop"]
CPU = torch.device("cpu")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def packed(view: ImageView, images: list[Image.Image]) -> PackedImages:
    packer = ImagePacker(view, len(images), new_buffer)
    for number, image in enumerate(images):
        packer.at(number).add(RgbImage.of(image))
    return packer.build()


def resized(view: ImageView, images: list[Image.Image]) -> torch.Tensor:
    return resize_packed(packed(view, images), CPU)


def by_worker(view: ImageView, images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([view(RgbImage.of(image)) for image in images])


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(sorted(VIEWS)), st.booleans())
@example(512, 512, "clip", False)
@example(256, 256, "clip", True)
@example(224, 224, "clip", True)
@example(1, 1, "clip", True)
@example(1, 700, "clip", False)
@example(1024, 3, "clip", True)
def test_pixels_are_those_of_resizing_on_a_cpu(width, height, name, is_grey):
    image = noise(width, height)
    images = [image.convert("L").convert("RGB") if is_grey else image]
    found, expected = (of(VIEWS[name], images).int() for of in (resized, by_worker))
    height_after, width_after = VIEWS[name].resizing(RgbImage.of(image)).size
    if height <= 4 * height_after and width <= 4 * width_after:
        assert torch.equal(found, expected)
    else:  # torch has finer weights there
        assert (found - expected).abs().max() <= 1
        assert (found != expected).float().mean() < 0.05


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(RESIZED_BY_PILLOW))
def test_pixels_are_nearly_pillows_for_models_that_resize_with_it(width, height, name):
    assert drift_from_pillow(width, height, name).max() <= 2


def test_few_pixels_are_not_pillows():
    sizes = np.random.default_rng(0).integers(1, 701, (60, 2)).tolist()
    shares = [(drift_from_pillow(*size, name) > 0).float().mean() for size in sizes for name in RESIZED_BY_PILLOW]
    assert np.mean(shares) < 0.005


def drift_from_pillow(width: int, height: int, name: str) -> torch.Tensor:
    view = replace(VIEWS[name], resampler="pillow")
    images = [photo(1, (width, height))]
    return (resized(view, images).int() - by_worker(view, images).int()).abs()


@pytest.mark.parametrize("resampler", ["torchvision", "pillow"])
@pytest.mark.parametrize("size", [(300, 401), (509, 256)], ids=str)
def test_jpegs_that_fast_decode_reduced_are_resized_as_a_cpu_does(resampler, size):
    view = ImageView(resize=64, crop=(64, 64), resampler=resampler, fast_decode=True)
    rgb = view.decode(encoded(photo(2, size)))
    assert rgb.scale > 1
    packer = ImagePacker(view, 1, new_buffer)
    packer.at(0).add(rgb)
    drift = (resize_packed(packer.build(), CPU)[0].int() - view(rgb).int()).abs()
    assert drift.max() <= 1
    assert (drift > 0).float().mean() < 0.02


# --- batches ---


def mixture() -> list[Image.Image]:
    sizes = [(256, 256), (31, 700), (512, 512), (1, 1), (700, 31), (600, 600), (256, 340), (224, 224), (3, 1000)]
    return [noise(*size, seed=seed) for seed, size in enumerate(sizes)]


def test_pixels_do_not_depend_on_what_else_is_in_the_batch():
    images = mixture()
    together = resized(CLIP, images)
    for number, image in enumerate(images):
        assert torch.equal(together[number], resized(CLIP, [image])[0]), image.size
    assert torch.equal(together.flip(0), resized(CLIP, images[::-1]))


def test_a_batch_that_is_resized_in_parts_has_the_same_pixels():
    images = mixture()
    whole = resized(CLIP, images)
    with mock.patch.object(device_resize, "_PIXELS_AT_A_TIME", 1):
        assert torch.equal(resized(CLIP, images), whole)


def test_the_first_images_of_a_batch_are_the_first_views():
    images = packed(CLIP, mixture())
    assert torch.equal(resize_packed(images[:4], CPU), resize_packed(images, CPU)[:4])


def test_no_images_are_no_views():
    assert views_on_device(packed(CLIP, []), CPU).shape == (0, 3, 224, 224)


def test_images_that_are_too_large_are_resized_where_they_are_packed():
    images = [noise(512, 513), noise(1025, 20), noise(512, 512)]
    assert packed(CLIP, images).places["width"].tolist() == [224, 224, 512]
    assert torch.equal(resized(CLIP, images), by_worker(CLIP, images))
    assert MOST_PIXELS == 512 * 512


# --- precision ---


@contextmanager
def told(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_pixels_are_the_same_where_torch_multiplies_with_less_precision(precision):
    images = mixture()
    expected = resized(CLIP, images)
    with told(precision):
        assert torch.equal(resized(CLIP, images), expected)


def test_pixels_are_the_same_under_autocast():
    images = packed(CLIP, mixture())
    with torch.autocast("cpu", torch.bfloat16):
        found = views_on_device(images, CPU)
    assert torch.equal(found, resized(CLIP, mixture()))


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_all_is_done_on_the_device_and_no_value_looked_at(name, monkeypatch):
    images = packed(VIEWS[name], mixture())
    with on_fake_gpu(monkeypatch, torch.nn.Module()):
        views = resize_packed(images, GPU)
    assert (views.device, views.shape) == (GPU, (len(images), 3, *images.size))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_pixels_of_a_gpu_are_those_of_a_cpu(precision):
    images = packed(CLIP, mixture())
    with told(precision):
        found = resize_packed(images, torch.device("cuda")).cpu()
    assert torch.equal(found, resize_packed(images, CPU))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_a_gpu_is_not_waited_for():
    images = packed(CLIP, mixture())
    resize_packed(images, torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        resize_packed(images, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
