import copy

import pytest
import torch
from torch import nn

from clipfilter_wds.models.fast.optimize import optimize_layers
from clipfilter_wds.models.fast.patches import PatchEmbedding, normalize_in_weights
from clipfilter_wds.models.scorer import ClipScorer
from tests.support.toys import make_clip

#: Those of OpenAI's models.
MEAN, STD = torch.tensor([122.77, 116.75, 104.09]), torch.tensor([68.5, 66.63, 70.32])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(12, 20), (14, 21)], ids=str)
def test_patches_of_any_image_are_those_of_the_convolution(shape, bias):
    convolution = nn.Conv2d(3, 7, kernel_size=(4, 5), stride=(4, 5), bias=bias)
    patches = nn.Sequential(convolution)
    optimize_layers(patches)
    assert not isinstance(patches[0], nn.Conv2d)
    pixels = torch.randn(2, 3, *shape)
    with torch.inference_mode():
        torch.testing.assert_close(patches(pixels), convolution(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 3}], ids=str)
def test_other_convolutions_stay(option):
    layers = nn.Sequential(nn.Conv2d(3, 6, **{"kernel_size": 4, "stride": 4, **option}))
    optimize_layers(layers)
    assert isinstance(layers[0], nn.Conv2d)


def normalising(convolution):
    """The patches of a convolution, that normalise pixels by their weights."""
    patches = PatchEmbedding(copy.deepcopy(convolution))
    patches.normalize(MEAN, STD)
    return patches


def pixels_and_normalised(shape=(4, 3, 32, 48)):
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels, (pixels - MEAN[:, None, None]) / STD[:, None, None]


@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_pixels_are_normalised_by_the_weights(bias):
    convolution = nn.Conv2d(3, 24, kernel_size=16, stride=16, bias=bias)
    pixels, normalised = pixels_and_normalised()
    expected = convolution(normalised)
    torch.testing.assert_close(normalising(convolution)(pixels), expected, atol=1e-5, rtol=1e-5)
    interleaved = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(normalising(convolution)(interleaved), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_in_low_precision_the_error_is_no_larger_than_with_normalised_pixels(dtype):
    convolution = nn.Conv2d(3, 64, kernel_size=32, stride=32, bias=False)
    nn.init.normal_(convolution.weight, std=0.02)  # as in OpenAI's ViT-B/32
    pixels, normalised = pixels_and_normalised((16, 3, 64, 64))
    pixels[:8] = pixels[:8] // 8 + 200  # bright, as of a white background
    normalised = (pixels - MEAN[:, None, None]) / STD[:, None, None]
    exact = convolution(normalised)
    before = PatchEmbedding(convolution).to(dtype)(normalised.to(dtype)).float() - exact
    after = normalising(convolution).to(dtype)(pixels).float() - exact
    assert after.square().mean() <= before.square().mean()
    assert after.mean(dim=(0, 2, 3)).abs().max() <= 2 * before.mean(dim=(0, 2, 3)).abs().max()  # nor is it lopsided


def test_towers_without_known_patches_want_normalised_pixels():
    towers = nn.Sequential(nn.Conv2d(3, 8, 3))
    optimize_layers(towers)
    assert not normalize_in_weights(towers, MEAN, STD)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_of_another_size_are_refused(tmp_path, precision):
    scorer = ClipScorer(make_clip(tmp_path, width=256), device="cpu", precision=precision)
    caption = scorer.preprocess.tokenize([["a cat"]]).input_ids
    with pytest.raises(ValueError, match="image size of 32x48 doesn't match the model's 32x32; pass on"):
        scorer(torch.zeros(1, 3, 32, 48, dtype=torch.uint8), caption)
