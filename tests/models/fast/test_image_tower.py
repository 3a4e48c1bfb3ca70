import copy
from collections import Counter

import pytest
import torch
from torch import nn

from clipfilter_wds.models.fast.image_tower import take_shortcuts
from clipfilter_wds.models.precision import NARROW
from clipfilter_wds.models.scorer import ClipScorer
from tests.support.dual_encoders import FAMILIES
from tests.support.toys import make_clip

#: Per family, how often each shortcut is taken, in towers of two layers.
TAKEN = {
    "clip": {"_Patches": 1, "_Attention": 2, "_LastLayer": 1},
    "chinese_clip": {"_Patches": 1, "_Attention": 2, "_LastLayer": 1},
    "altclip": {"_Patches": 1, "_Attention": 2, "_LastLayer": 1},
    "siglip": {"_Patches": 1},  # its embedding comes from all tokens
    "open_clip": {"_Patches": 1},
    "open_clip, squashed": {"_Patches": 1, "SiLU": 4},  # the one with QuickGELU
}


@pytest.mark.parametrize("family", TAKEN)
def test_in_float32_embeddings_are_the_same_to_rounding(tmp_path, family):
    make, _, prefix = FAMILIES.get(family, (make_clip, None, ""))
    scorer = ClipScorer(prefix + str(make(tmp_path / "model")), device="cpu", precision="fp32")
    short = copy.deepcopy(scorer.model)
    take_shortcuts(short)
    taken = Counter(type(module).__name__ for module in short.modules())
    usual = Counter(type(module).__name__ for module in scorer.model.modules())
    assert {name: taken[name] - usual[name] for name in TAKEN[family]} == TAKEN[family]
    pixels = torch.randn(5, 3, *scorer.preprocess.view.crop, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = scorer.model.image_features(pixels)
        torch.testing.assert_close(short.image_features(pixels), expected, atol=1e-5, rtol=1e-5)
    assert expected.std(dim=0).mean() > 0.01  # images differ


def test_taking_them_again_changes_nothing(tmp_path):
    scorer = ClipScorer(make_clip(tmp_path), device="cpu", precision="fp32")
    once = copy.deepcopy(scorer.model)
    take_shortcuts(once)
    twice = copy.deepcopy(once)
    take_shortcuts(twice)
    pixels = torch.randn(3, 3, *scorer.preprocess.view.crop)
    ids = scorer.preprocess.tokenize([["a photo of a cat"]]).input_ids
    with torch.inference_mode():
        assert torch.equal(once.image_features(pixels), twice.image_features(pixels))
        assert torch.equal(once.text_features(ids), twice.text_features(ids))


def test_a_wide_model_takes_them_in_float32_too_on_a_processor(tmp_path):
    narrow, wide = (
        ClipScorer(make_clip(tmp_path / str(width), width=width), device="cpu", precision="fp32")
        for width in (NARROW // 2, NARROW)
    )
    is_short = [
        any(type(module).__name__ == "_LastLayer" for module in scorer.model.modules()) for scorer in (narrow, wide)
    ]
    assert is_short == [False, True]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(12, 20), (14, 21)], ids=str)
def test_patches_of_any_image_are_those_of_the_convolution(shape, bias):
    convolution = nn.Conv2d(3, 7, kernel_size=(4, 5), stride=(4, 5), bias=bias)
    patches = nn.Sequential(convolution)
    take_shortcuts(patches)
    assert not isinstance(patches[0], nn.Conv2d)
    pixels = torch.randn(2, 3, *shape)
    with torch.inference_mode():
        torch.testing.assert_close(patches(pixels), convolution(pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 3}], ids=str)
def test_other_convolutions_stay(option):
    layers = nn.Sequential(nn.Conv2d(3, 6, **{"kernel_size": 4, "stride": 4, **option}))
    take_shortcuts(layers)
    assert isinstance(layers[0], nn.Conv2d)
