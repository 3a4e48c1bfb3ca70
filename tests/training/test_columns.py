import pytest
import torch

from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.types import DropReason
from tests.support.toys import pair


@pytest.fixture
def batch(scorer):
    """Two pairs of which one can be scored."""
    rows = [scorer.preprocess.pair(pair(0)["jpg"], "a caption"), scorer.preprocess.pair(b"no image", "a caption")]
    tensors = {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "input_ids")}
    return {**tensors, "reason": [row["reason"] for row in rows]}


def kept(batches, scorer):
    loader = ClipFilterLoader(batches, scorer, threshold=None)
    return [score for batch in loader for score in batch["score"].tolist()], loader.stats


def test_a_sample_with_a_reason_is_counted_and_not_scored(batch, scorer):
    scores, stats = kept([batch], scorer)
    assert scores == scorer(batch["pixel_values"][:1], batch["input_ids"][:1]).tolist()
    assert (stats.seen, stats.kept, stats.dropped) == (2, 1, {DropReason.UNREADABLE_IMAGE: 1})


def test_whole_numbers_of_other_types_and_arrays_give_the_same_scores(batch, scorer):
    changed = {**batch, "pixel_values": batch["pixel_values"].long(), "input_ids": batch["input_ids"].numpy()}
    assert kept([changed], scorer) == kept([batch], scorer)


def test_a_batch_without_pixels_names_what_is_missing(scorer):
    with pytest.raises(ValueError, match=r"columns \['image'\], but no input_ids and no pixel_values and no reason"):
        kept([{"image": [1]}], scorer)


def test_a_loader_that_leaves_out_why_samples_can_not_be_scored_is_refused(batch, scorer):
    del batch["reason"]
    with pytest.raises(ValueError, match=r"no reason; .* else would be as a black image"):
        kept([batch], scorer)


def test_a_loader_of_samples_that_are_in_no_batch_says_so(scorer):
    with pytest.raises(ValueError, match=r"a loader of samples, not of batches: .* \(3, 32, 32\)\. Make batches first"):
        kept([scorer.preprocess.pair(pair(0)["jpg"], "a caption")], scorer)


def test_a_batch_that_is_no_dict_is_refused(batch, scorer):
    with pytest.raises(TypeError, match="a batch is a tuple; it has to be a dict of columns"):
        kept([tuple(batch.values())], scorer)


def test_columns_of_different_lengths_are_refused_with_all_lengths(batch, scorer):
    with pytest.raises(ValueError, match=r"different lengths: {'pixel_values': 2, 'input_ids': 2, 'reason': 1}"):
        kept([{**batch, "reason": [""]}], scorer)


def test_pixels_that_were_normalised_are_refused(batch, scorer):
    with pytest.raises(TypeError, match=r"pixel_values are torch.float32; pass on the uint8"):
        kept([{**batch, "pixel_values": batch["pixel_values"] / 255}], scorer)
