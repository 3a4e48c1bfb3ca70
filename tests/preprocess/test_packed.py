"""Images are packed one behind another, whatever they are and whatever becomes of those between them."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from clipfilter_wds.preprocess.batch import BatchBuilder, PreparedBatch, new_buffer
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.preprocess.packed import PackedImages, packed_bytes
from clipfilter_wds.types import DropReason, UnusableError
from tests.support.toys import encoded, photo

#: JPEGs that are decoded in place or left to Pillow, other formats, what is too large, and what is no image.
IMAGES = {
    "jpeg": encoded(photo(0)),
    "cut": encoded(photo(1, (200, 150)))[:-300],
    "grey": encoded(photo(2, (31, 57)).convert("L")),
    "cmyk": encoded(photo(3).convert("CMYK")),
    "png": encoded(photo(4, (33, 21)), "PNG"),
    "no image": b"no image",
    "palette": encoded(photo(5).convert("P"), "PNG"),
    "too large": encoded(photo(6, (600, 500))),
    "too long": encoded(photo(7, (1500, 3))),
    "webp": encoded(photo(8), "WEBP"),
    "last": encoded(photo(9, (1, 1))),
}
UNREADABLE = {"cut", "no image"}


@pytest.fixture(scope="module")
def preprocess(scorer):
    return scorer.preprocess.with_view(resize_on_device=True)


def build(builder: BatchBuilder, preprocess, images: list[bytes]) -> PreparedBatch:
    for index, image in enumerate(images):
        builder.add(f"{index}", index, partial(preprocess.open_pair, image, "a caption"))
    return builder.build()


def unpacked(images: PackedImages) -> list[np.ndarray]:
    """Each image's pixels, uint8 ``[H, W, 3]``."""
    found = []
    for place in images.places:
        start, height, width = (int(place[name]) for name in ("offset", "height", "width"))
        found.append(images.pixels[start : start + 3 * height * width].numpy().reshape(height, width, 3))
    return found


def test_a_batch_holds_the_decoded_pixels_of_all_that_is_usable(preprocess):
    batch = build(BatchBuilder(preprocess, len(IMAGES)), preprocess, [*IMAGES.values()])
    reasons = [DropReason.UNREADABLE_IMAGE if name in UNREADABLE else None for name in IMAGES]
    assert [row.reason for row in batch.rows] == reasons
    usable = [name for name in IMAGES if name not in UNREADABLE]
    for name, pixels in zip(usable, unpacked(batch.pixel_values), strict=True):
        rgb = preprocess.view.decode(IMAGES[name])
        expected = preprocess.view(rgb) if "too" in name else rgb.pixels[:3]
        assert np.array_equal(pixels, expected.permute(1, 2, 0).numpy()), name
    assert [(row.width, row.height) for row in batch.rows if row.reason is None][6:] == [(1500, 3), (48, 40), (1, 1)]


def test_a_sample_that_fails_after_it_was_packed_leaves_no_gap(preprocess):
    def fails(out) -> None:
        preprocess.open_pair(IMAGES["png"], "a caption", out)
        raise UnusableError(DropReason.NOT_SELECTED)

    builder = BatchBuilder(preprocess, 4)
    for index, open_pair in enumerate(
        [
            partial(preprocess.open_pair, IMAGES["jpeg"], "one"),
            fails,
            partial(preprocess.open_pair, IMAGES["grey"], "two"),
            fails,
        ]
    ):
        builder.add(str(index), index, open_pair)
    images = builder.build().pixel_values
    assert images.places["offset"].tolist() == [0, 3 * 48 * 40]
    assert images.places["width"].tolist() == [48, 31]


def test_batches_are_apart_and_an_empty_one_is_empty(preprocess):
    builder = BatchBuilder(preprocess, 2)
    first = build(builder, preprocess, [IMAGES["jpeg"], IMAGES["png"]]).pixel_values
    before = [pixels.copy() for pixels in unpacked(first)]
    second = build(builder, preprocess, [IMAGES["last"]]).pixel_values
    assert all(map(np.array_equal, unpacked(first), before))
    assert second.places["offset"].tolist() == [0]
    assert len(build(builder, preprocess, []).pixel_values) == 0


def test_memory_grows_with_what_is_packed_and_is_asked_for_at_once_the_next_time(preprocess):
    asked = []

    def buffers(num_bytes: int) -> torch.Tensor:
        asked.append(num_bytes)
        return new_buffer(num_bytes)

    images = [encoded(photo(seed, (100 + 10 * seed, 100))) for seed in range(20)]
    builder = BatchBuilder(preprocess, 20, buffers)
    expected = build(BatchBuilder(preprocess, 20), preprocess, images)
    for _ in range(2):
        batch = build(builder, preprocess, images)
        assert all(map(np.array_equal, unpacked(batch.pixel_values), unpacked(expected.pixel_values)))
    needed = len(batch.pixel_values.pixels)
    assert asked == sorted(asked)
    assert asked[-1] == asked[-2]
    assert needed <= asked[-1] <= 1.25 * needed


def test_no_batch_asks_for_more_than_its_images_may_take(preprocess):
    asked = []

    def buffers(num_bytes: int) -> torch.Tensor:
        asked.append(num_bytes)
        return new_buffer(num_bytes)

    builder = BatchBuilder(preprocess, 3, buffers)
    build(builder, preprocess, [encoded(Image.new("RGB", (512, 512)))] * 3)
    most = 3 * preprocess.view_bytes(interleaved=True)
    assert packed_bytes(preprocess.view) == 3 * 512 * 512
    assert most < asked[-1] < most + 4096


def test_a_model_that_the_device_can_not_resize_for_is_refused():
    with pytest.raises(ValueError, match="this model's is nearest"):
        ImageView(resize=32, crop=(32, 32), interpolation="nearest", resize_on_device=True)


def test_samples_of_other_pipelines_are_refused(preprocess):
    for make in (
        lambda: preprocess({"jpg": IMAGES["jpeg"], "txt": b"a caption"}),
        lambda: preprocess.pair(photo(0), "a caption"),
    ):
        with pytest.raises(ValueError, match="make the scorer without resize_on_device"):
            make()
