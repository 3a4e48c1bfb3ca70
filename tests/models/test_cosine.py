import numpy as np
import pytest
import torch

from clipfilter_wds.models.cosine import captions_of, cosines, num_captions, unit_embeddings
from clipfilter_wds.preprocess.tokens import NO_CAPTION


def test_several_captions_of_an_image_are_reduced():
    generator = np.random.default_rng(0)
    images, captions = (torch.from_numpy(generator.normal(size=(rows, 8))).float() for rows in (3, 4))
    input_ids = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [NO_CAPTION] * 2], [[7, 8], [NO_CAPTION] * 2]])
    assert captions_of(input_ids).tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert num_captions(input_ids) == [2, 1, 1]
    products = images @ captions.T
    for reduce, of_first in (("max", torch.amax), ("mean", torch.mean), ("min", torch.amin)):
        expected = torch.stack([of_first(products[0, :2], 0), products[1, 2], products[2, 3]])
        torch.testing.assert_close(cosines(images, captions, input_ids, reduce), expected)


@pytest.mark.parametrize("shape", [(0, 7), (0, 2, 7)], ids=str)
def test_no_image_has_no_score(shape):
    nothing = torch.empty(0, 0)
    assert cosines(nothing, nothing, torch.empty(shape, dtype=torch.int64), "max").shape == (0,)


@pytest.mark.parametrize("reduce", ["max", "mean", "min"])
@pytest.mark.parametrize("shape", [(0, 7), (0, 2, 7)], ids=str)
def test_no_image_has_no_embeddings(shape, reduce):
    nothing, input_ids = torch.empty(0, 0), torch.empty(shape, dtype=torch.int64)
    assert num_captions(input_ids) == []
    assert unit_embeddings(nothing, nothing, input_ids, reduce).shape == (2, 0, 0)


@pytest.mark.parametrize("reduce", ["max", "mean", "min"])
def test_the_embedding_of_several_captions_is_that_of_the_one_that_counts(reduce):
    generator = torch.Generator().manual_seed(0)
    counts, dim = [3, 1, 4, 2], 8
    images, captions = torch.randn(len(counts), dim, generator=generator), torch.randn(10, dim, generator=generator)
    images, captions = images / images.norm(dim=1, keepdim=True), captions / captions.norm(dim=1, keepdim=True)
    input_ids = torch.full((len(counts), 4, 2), NO_CAPTION)
    for image, count in enumerate(counts):
        input_ids[image, :count] = 1
    found_images, found_captions = unit_embeddings(images, captions, input_ids, reduce)
    torch.testing.assert_close(found_images, images)
    for image, own in enumerate(captions.split(counts)):
        similarities = own @ images[image]
        chosen = {"max": own[similarities.argmax()], "min": own[similarities.argmin()], "mean": own.mean(0)}[reduce]
        torch.testing.assert_close(found_captions[image], chosen / chosen.norm())
    if reduce != "mean":
        scores = cosines(images, captions, input_ids, reduce)
        torch.testing.assert_close((found_images * found_captions).sum(dim=1), scores)


def test_of_equal_captions_the_first_counts():
    images, captions = torch.eye(2)[:1], torch.eye(2)[[1, 0, 0]]
    input_ids = torch.ones(1, 3, 2, dtype=torch.int64)
    assert unit_embeddings(images, captions, input_ids, "max")[1].tolist() == [[1.0, 0.0]]
    assert unit_embeddings(images, captions, input_ids, "min")[1].tolist() == [[0.0, 1.0]]


def test_embeddings_that_are_not_of_length_one_are_made_so():
    half = torch.tensor([[0.5, 0.0]])  # as the mean of an image's and its mirror image's may be
    assert unit_embeddings(half, torch.eye(2)[:1], torch.ones(1, 3), "max").tolist() == [[[1.0, 0.0]], [[1.0, 0.0]]]
