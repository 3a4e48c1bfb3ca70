"""The filter around loaders that people have already."""

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.types import DropReason
from tests.support.toys import pair, write_shard

THRESHOLD = 0.12


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    samples = [pair(i) for i in range(30)]
    samples[4] = {**samples[4], "txt": b" "}
    samples[9] = {**samples[9], "jpg": b"no image"}
    samples[11] = {"jpg": samples[11]["jpg"], "json": b'{"caption": "photo number 11"}'}
    return write_shard(tmp_path_factory.mktemp("in") / "0.tar", samples)


def kept(batches):
    return [
        (key, round(float(score), 5))
        for batch in batches
        for key, score in zip(batch["__key__"], batch["score"], strict=True)
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_around_a_plain_webdataset_it_keeps_and_counts_what_our_own_dataset_does(shard, scorer, num_workers):
    pipeline = webdataset.WebDataset(str(shard), shardshuffle=False).map(scorer.preprocess)
    pipeline = pipeline.batched(7)
    theirs = ClipFilterLoader(
        DataLoader(pipeline, batch_size=None, num_workers=num_workers), scorer, threshold=THRESHOLD
    )
    ours = ClipFilterLoader(ClipWebDataset(shard, scorer.preprocess), scorer, threshold=THRESHOLD)
    assert kept(theirs) == kept(ours)
    assert theirs.stats == ours.stats
    assert theirs.stats.dropped[DropReason.UNREADABLE_IMAGE] == theirs.stats.dropped[DropReason.BLANK_CAPTION] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_what_a_loader_is_still_copying_to_the_gpu_is_scored_once_it_is_there(shard, clip_folder):
    scorer = ClipScorer(clip_folder, device="cuda")
    pipeline = webdataset.WebDataset(str(shard), shardshuffle=False).map(scorer.preprocess)
    pipeline = pipeline.batched(7)

    def copying():
        for batch in pipeline:
            torch.cuda._sleep(200_000_000)  # the GPU has something to do before it copies
            yield {**batch, "pixel_values": batch["pixel_values"].pin_memory().to("cuda", non_blocking=True)}

    theirs = kept(ClipFilterLoader(copying(), scorer, threshold=-1.0))
    ours = kept(ClipFilterLoader(ClipWebDataset(shard, scorer.preprocess), scorer, threshold=-1.0))
    assert [key for key, _ in theirs] == [key for key, _ in ours]
    assert [score for _, score in theirs] == pytest.approx([score for _, score in ours], abs=1e-4)


def test_a_foreign_loader_says_that_it_cannot_be_resumed(scorer):
    with pytest.raises(ValueError, match="only a loader of a ClipWebDataset can be resumed"):
        ClipFilterLoader([], scorer).state_dict()
