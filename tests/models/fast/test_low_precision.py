import pytest
import torch

from clipfilter_wds.models.fast.low_precision import low_precision_towers
from clipfilter_wds.models.fast.text_tower import PackedTextTower, PaddedTextTower
from clipfilter_wds.models.loading import load_model
from tests.support.dual_encoders import FAMILIES
from tests.support.toys import make_clip

#: Whose images are not taken as they are.
NORMALISED = ("open_clip, averaged",)
#: Whose padding comes behind all that its tokens see.
CAUSAL = ("clip", "metaclip_2", "open_clip", "open_clip, squashed")


@pytest.fixture(scope="module", params=["clip", *FAMILIES])
def family(request, tmp_path_factory):
    """A family's name, and a model."""
    make, _, prefix = FAMILIES.get(request.param, (make_clip, None, ""))
    return request.param, load_model(prefix + str(make(tmp_path_factory.mktemp("of") / "model")), None)


@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_embeddings_are_those_of_the_model_to_rounding(family, packed):
    name, model = family
    towers, is_packed = low_precision_towers(model, torch.float32, packed=packed)
    assert is_packed == (packed and name in CAUSAL)
    kinds = [type(module) for module in towers.modules() if isinstance(module, PackedTextTower | PaddedTextTower)]
    assert kinds == [PackedTextTower if packed else PaddedTextTower] * (name in CAUSAL)
    captions = ["a", "a photo of a red cat", "two", "x" * 300, "a dog on a sofa"]
    ids = model.preprocess.tokenize([[caption] for caption in captions]).input_ids
    expected = model.towers.text_features(ids)
    torch.testing.assert_close(towers.text_features(ids), expected, atol=1e-5, rtol=1e-5)
    assert expected.std(dim=0).mean() > 0.01  # captions differ

    assert towers.normalizes == (name not in NORMALISED)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, *model.preprocess.view.crop), dtype=torch.uint8, generator=generator)
    normalised = (pixels - model.pixel_mean[:, None, None]) / model.pixel_std[:, None, None]
    expected = model.towers.image_features(normalised)
    found = towers.image_features(pixels if towers.normalizes else normalised)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert expected.std(dim=0).mean() > 0.01


@torch.inference_mode()
def test_the_model_itself_stays_as_it_is(family):
    _, model = family
    before = str(model.towers), model.towers.weights_hash()
    towers, _ = low_precision_towers(model, torch.bfloat16, packed=True)
    assert (str(model.towers), model.towers.weights_hash()) == before
    assert torch.bfloat16 in {weight.dtype for weight in towers.parameters()}
