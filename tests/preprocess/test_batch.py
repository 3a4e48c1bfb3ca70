from functools import partial

import pytest
import torch

from clipfilter_wds.preprocess.batch import BatchBuilder, PreparedBatch, new_buffer
from clipfilter_wds.types import DropReason
from tests.support.toys import encoded, photo

GOOD = {seed: encoded(photo(seed)) for seed in range(6)}


class Buffers:
    """Gives memory, and remembers which."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def __call__(self, num_bytes: int) -> torch.Tensor:
        self.given.append(new_buffer(num_bytes).fill_(7))
        return self.given[-1]


def build(builder: BatchBuilder, preprocess, images: list[bytes]) -> PreparedBatch:
    for index, image in enumerate(images):
        builder.add(f"{index}", index, partial(preprocess.open_pair, image, f"number {index}"), uid=bytes([index] * 16))
    return builder.build()


@pytest.mark.parametrize("num_images", [0, 1, 5])
def test_a_batch_holds_what_its_samples_are_when_they_are_opened_one_by_one(scorer, num_images):
    images = [GOOD[seed] for seed in range(num_images)]
    batch = build(BatchBuilder(scorer.preprocess, 5), scorer.preprocess, images)
    pairs = [scorer.preprocess.open_pair(image, f"number {index}") for index, image in enumerate(images)]
    pixel_values, tokens = scorer.preprocess.collate(pairs)
    assert torch.equal(batch.pixel_values, pixel_values)
    assert torch.equal(batch.input_ids, tokens.input_ids)
    assert [(row.num_tokens, row.width, row.height) for row in batch.rows] == [
        (num_tokens, 48, 40) for num_tokens in tokens.num_tokens
    ]


def test_views_lie_in_the_memory_that_was_given_without_gaps_for_unusable_samples(scorer):
    buffers = Buffers()
    builder = BatchBuilder(scorer.preprocess, 4, buffers)
    batch = build(builder, scorer.preprocess, [GOOD[0], b"no image", GOOD[1]])
    [buffer] = buffers.given
    assert len(buffer) == 4 * 3 * 32 * 32
    assert batch.pixel_values.data_ptr() == buffer.data_ptr()
    assert batch.pixel_values.shape == (2, 3, 32, 32)
    assert bool((buffer[2 * 3 * 32 * 32 :] == 7).all())
    assert [(row.key, row.index, row.reason, row.uid[0]) for row in batch.rows] == [
        ("0", 0, None, 0),
        ("1", 1, DropReason.UNREADABLE_IMAGE, 1),
        ("2", 2, None, 2),
    ]


def test_each_batch_has_memory_of_its_own_and_an_empty_one_none(scorer):
    buffers = Buffers()
    builder = BatchBuilder(scorer.preprocess, 2, buffers)
    first = build(builder, scorer.preprocess, [GOOD[0], GOOD[1]])
    before = first.pixel_values.clone()
    second = build(builder, scorer.preprocess, [GOOD[2]])
    empty = build(builder, scorer.preprocess, [])
    assert len(buffers.given) == 2
    assert torch.equal(first.pixel_values, before)
    assert len(second.pixel_values) == 1
    assert empty.pixel_values.shape == (0, 3, 32, 32)
    assert not len(empty.rows)


@pytest.mark.parametrize("seed", range(3))
def test_interleaved_views_are_the_same_pixels_in_another_order(scorer, seed):
    images = [GOOD[seed], b"no image", GOOD[seed + 1]]
    usual = build(BatchBuilder(scorer.preprocess, 4), scorer.preprocess, images)
    interleaved = build(BatchBuilder(scorer.preprocess, 4, interleaved=True), scorer.preprocess, images)
    assert interleaved.pixel_values.stride() == (32 * 32 * 4, 1, 32 * 4, 4)
    assert torch.equal(interleaved.pixel_values, usual.pixel_values)
    assert interleaved.rows == usual.rows
