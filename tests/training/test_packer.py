import pytest
from PIL import Image

from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.keep_rate import StarvationError
from tests.support.lockstep import Job, begin, run
from tests.support.toys import encoded, write_shard

PAIR = {"png": encoded(Image.new("RGB", (1, 1)), "PNG"), "txt": b"a dot"}


def endless(folder, kept, shuffle):
    """A job of two shards of four pairs."""
    urls = [str(write_shard(folder / f"{shard}.tar", [PAIR] * 4, start=100 * shard)) for shard in range(2)]
    dataset = ClipWebDataset(urls, shuffle=shuffle, image_transform=lambda image: image.size[0])
    config = LoaderConfig(threshold=0.5, batch_size=4, end="repeat", batches_per_epoch=1)
    return Job(dataset=dataset, config=config, kept=frozenset(kept))


def test_a_rank_that_is_dealt_the_same_shard_again_and_again_does_not_starve(tmp_path):
    kept = [f"{number:09d}" for number in range(4)]  # of one shard only
    ranks = begin(endless(tmp_path, kept, shuffle=4), world_size=2, num_workers=1)
    run(ranks, 100)
    assert all(sorted(batch) == kept for rank in ranks for batch in rank.given)


def test_ranks_that_keep_nothing_starve_after_some_passes(tmp_path):
    for rank in begin(endless(tmp_path, [], shuffle=4), world_size=2, num_workers=1):
        with pytest.raises(StarvationError, match=r"nothing is kept: 40 whole epochs left none"):
            run([rank])
