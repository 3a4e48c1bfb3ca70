import copy

import pytest
import torch

from clipfilter_wds.models.fast.text_tower import PackedTextTower, PaddedTextTower, optimize_text_tower
from clipfilter_wds.models.scorer import ClipScorer
from tests.support.dual_encoders import FAMILIES
from tests.support.toys import make_clip

CAPTIONS = ["a", "a photo of a cat", "two", "x" * 300, "a dog on a red sofa"]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return ClipScorer(make_clip(tmp_path_factory.mktemp("model")), device="cpu", precision="fp32")


@pytest.mark.parametrize("captions", [CAPTIONS, CAPTIONS[:1], CAPTIONS[:3], CAPTIONS[3:4]], ids=len)
@pytest.mark.parametrize("finds_end_by", ["its id", "the largest id"])
@pytest.mark.parametrize("kind", [PackedTextTower, PaddedTextTower])
def test_embeddings_are_those_of_the_whole_tower(scorer, captions, finds_end_by, kind):
    tower = copy.deepcopy(scorer.exact.towers.model.text_model)
    if finds_end_by == "the largest id":
        tower.eos_token_id = 2
    ids = scorer.preprocess.tokenize([[caption] for caption in captions]).input_ids
    with torch.inference_mode():
        expected = tower(ids).pooler_output
        torch.testing.assert_close(kind(tower)(ids).pooler_output, expected, atol=1e-5, rtol=1e-5)
    if len(captions) > 1:
        assert expected.std(dim=0).mean() > 0.01  # captions differ


def test_only_low_precision_packs_since_kernels_are_chosen_by_shape(scorer):
    low = ClipScorer(scorer.model_name, device="cpu", precision="bf16")
    packed = [sum(isinstance(module, PackedTextTower) for module in model.modules()) for model in (low.fast, low.exact)]
    assert packed == [1, 0]


def test_other_text_towers_stay(tmp_path):
    make, _, prefix = FAMILIES["siglip"]
    siglip = ClipScorer(prefix + str(make(tmp_path / "model")), device="cpu", precision="fp32").exact.towers
    before = str(siglip)
    assert not any(optimize_text_tower(siglip, packed=packed) for packed in (False, True))
    assert str(siglip) == before


@pytest.mark.parametrize("kind", [PackedTextTower, PaddedTextTower])
def test_a_caption_does_not_hang_on_the_longer_ones_beside_it(scorer, kind):
    tower = kind(copy.deepcopy(scorer.exact.towers.model.text_model))
    ids = scorer.preprocess.tokenize([[caption] for caption in CAPTIONS]).input_ids
    used = scorer.preprocess.tokenize.used_lengths(ids)
    with torch.inference_mode():
        together = tower(ids).pooler_output
        alone = torch.cat([tower(ids[i : i + 1, : int(used[i])]).pooler_output for i in range(len(ids))])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
