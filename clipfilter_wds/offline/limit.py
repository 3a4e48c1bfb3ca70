"""Finds the shards that hold the first samples of a run."""

from collections.abc import Iterable

from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.types import ShardEnd, ShardError


def first_samples(urls: Iterable[str], limit: int, layout: SampleLayout) -> dict[str, int]:
    """Per shard, how many of its first samples are among the first ``limit`` of all.

    The shards are read for it, one after another, as far as the limit goes. One that can't be read counts as empty.
    """
    found: dict[str, int] = {}
    left = limit
    for url in urls:
        if not left:
            break
        found[url] = min(left, _num_samples(url, layout))
        left -= found[url]
    return found


def _num_samples(url: str, layout: SampleLayout) -> int:
    try:
        with open_shard(url) as shard:
            for item in read_samples(shard, layout, wanted=lambda index: False):
                if isinstance(item, ShardEnd):
                    return item.num_samples
    except ShardError:
        pass  # the run says why
    return 0
