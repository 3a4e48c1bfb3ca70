import copy
from collections import Counter

import pytest
import torch

from clipfilter_wds.models.fast.optimize import optimize_layers
from clipfilter_wds.models.precision import NARROW
from clipfilter_wds.models.scorer import ClipScorer
from tests.support.dual_encoders import FAMILIES
from tests.support.toys import make_clip

#: Per family, how often each kind of layer is rewritten, in towers of two layers.
REWRITTEN = {
    "clip": {"PatchEmbedding": 1, "_Encoder": 1},
    "chinese_clip": {"PatchEmbedding": 1, "_Encoder": 1},
    "altclip": {"PatchEmbedding": 1, "_Encoder": 1},
    "metaclip_2": {"PatchEmbedding": 1, "_Encoder": 1},
    "siglip": {"PatchEmbedding": 1, "_Encoder": 2, "FastMultiheadAttention": 1},
    "open_clip": {"PatchEmbedding": 1, "_Encoder": 1},
    "open_clip, squashed": {"PatchEmbedding": 1, "_Encoder": 1, "SiLU": 4},  # the one with QuickGELU
    "open_clip, averaged": {"PatchEmbedding": 1, "FastMultiheadAttention": 4},
}


@pytest.mark.parametrize("family", REWRITTEN)
def test_in_float32_embeddings_are_the_same_to_rounding(tmp_path, family):
    make, _, prefix = FAMILIES.get(family, (make_clip, None, ""))
    scorer = ClipScorer(prefix + str(make(tmp_path / "model")), device="cpu", precision="fp32")
    short = copy.deepcopy(scorer.exact.towers)
    optimize_layers(short)
    taken = Counter(type(module).__name__ for module in short.modules())
    usual = Counter(type(module).__name__ for module in scorer.exact.towers.modules())
    assert {name: taken[name] - usual[name] for name in REWRITTEN[family]} == REWRITTEN[family]
    pixels = torch.randn(5, 3, *scorer.preprocess.view.crop, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = scorer.exact.towers.image_features(pixels)
        torch.testing.assert_close(short.image_features(pixels), expected, atol=1e-5, rtol=1e-5)
    assert expected.std(dim=0).mean() > 0.01  # images differ


def test_optimizing_again_changes_nothing(tmp_path):
    scorer = ClipScorer(make_clip(tmp_path), device="cpu", precision="fp32")
    once = copy.deepcopy(scorer.exact.towers)
    optimize_layers(once)
    twice = copy.deepcopy(once)
    optimize_layers(twice)
    pixels = torch.randn(3, 3, *scorer.preprocess.view.crop)
    ids = scorer.preprocess.tokenize([["a photo of a cat"]]).input_ids
    with torch.inference_mode():
        assert torch.equal(once.image_features(pixels), twice.image_features(pixels))
        assert torch.equal(once.text_features(ids), twice.text_features(ids))


def test_a_wide_model_is_optimized_in_float32_too_on_a_cpu(tmp_path):
    narrow, wide = (
        ClipScorer(make_clip(tmp_path / str(width), width=width), device="cpu", precision="fp32")
        for width in (NARROW // 2, NARROW)
    )
    is_optimized = [
        any(type(module).__name__ == "_Encoder" for module in scorer.exact.towers.modules())
        for scorer in (narrow, wide)
    ]
    assert is_optimized == [False, True]
