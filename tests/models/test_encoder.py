import copy

import pytest
import torch
from torch import nn

from clipfilter_wds.models.cosine import cosines
from clipfilter_wds.models.scorer import ClipScorer
from tests.support.toys import encoded, make_clip, photo


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def scorer(request, tmp_path_factory):
    folder = make_clip(tmp_path_factory.mktemp("model"), image_size=64, patch_size=16, width=256, seed=3)
    return ClipScorer(folder, device="cpu", precision=request.param)


@pytest.fixture(scope="module")
def inputs(scorer):
    pairs = [scorer.preprocess.open_pair(encoded(photo(seed)), "word " * (1 + 5 * seed)) for seed in range(11)]
    pixel_values, tokens = scorer.preprocess.collate(pairs)
    return pixel_values, tokens.input_ids


def encoders(scorer):
    return {scorer.exact, scorer.fast}


def test_in_float32_the_fast_encoder_is_the_exact_one(scorer):
    assert (scorer.fast is scorer.exact) == (scorer.precision == "fp32")


def test_both_encoders_give_unit_float32_embeddings_and_their_cosines_are_the_scores(scorer, inputs):
    for encoder in encoders(scorer):
        images, captions = encoder(*inputs)
        for embeds in (images, captions):
            assert embeds.dtype == torch.float32
            torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)))
        assert torch.equal(images, encoder.encode_image(inputs[0]))
        assert torch.equal(captions, encoder.encode_text(inputs[1]))
        scores = scorer(*inputs, exact=encoder is scorer.exact)
        assert torch.equal(cosines(images, captions, inputs[1], "max"), scores)


def test_autocast_around_a_scorer_changes_no_bit(scorer, inputs):
    fast, exact = scorer(*inputs), scorer(*inputs, exact=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer(*inputs), fast)
        assert torch.equal(scorer(*inputs, exact=True), exact)


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double])
def test_a_cast_of_the_module_that_holds_a_scorer_changes_no_bit(scorer, inputs, cast):
    """As a Trainer with precision="bf16-true" casts a LightningModule."""
    fast, exact = scorer(*inputs), scorer(*inputs, exact=True)
    holder = nn.Sequential(copy.deepcopy(scorer), nn.Linear(1, 1))
    dtypes = [weight.dtype for weight in holder[0].parameters()]
    cast(holder)
    assert [weight.dtype for weight in holder[0].parameters()] == dtypes
    assert torch.equal(holder[0](*inputs), fast)
    assert torch.equal(holder[0](*inputs, exact=True), exact)


@pytest.mark.parametrize("exact", [False, True])
def test_a_loss_can_be_weighted_by_scores(scorer, inputs, exact):
    losses = torch.ones(len(inputs[0]), requires_grad=True)
    scores = scorer(*inputs, exact=exact)
    (losses * scores).sum().backward()
    assert torch.equal(losses.grad, scores)


@pytest.mark.parametrize("name", ["exact", "fast"])
def test_encoding_can_be_ended_before_every_batch(scorer, inputs, name):
    pixel_values, input_ids = (part.repeat(20, *[1] * (part.ndim - 1)) for part in inputs)
    input_ids[:, 1] = torch.arange(len(input_ids))  # since equal captions are encoded once
    encoder = getattr(scorer, name)
    for encode, rows in ((encoder.encode_image, pixel_values), (encoder.encode_text, input_ids)):
        checks = []
        encode(rows, check=lambda checks=checks: checks.append(None))
        assert len(checks) > 3
        results = iter([None, None])
        with pytest.raises(StopIteration):
            encode(rows, check=lambda results=results: next(results))
