import numpy as np
import pytest
import torch

from clipfilter_wds.models.cosine import captions_of, cosines, num_captions
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
