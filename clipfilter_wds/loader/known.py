"""Score tables -> what the workers know of a shard before they read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from clipfilter_wds.dataset import ClipWebDataset
from clipfilter_wds.scores import ScoreTable, ShardScores, check_fingerprint
from clipfilter_wds.selection import select
from clipfilter_wds.shards import public_url
from clipfilter_wds.stream import KnownSample, KnownShard
from clipfilter_wds.types import DropReason, ShardError


@dataclass(frozen=True, kw_only=True, eq=False)
class TableLookUp:
    """Knows the samples of every shard from its score table; made by the loader, and asked by the workers.

    Attributes:
        table: The scores.
        threshold: Decides what is kept.
        failed: Shards that could not be scored, and why; they are left out.
    """

    table: ScoreTable
    threshold: float | None
    failed: Mapping[str, str]

    @classmethod
    def of(cls, table: ScoreTable, dataset: ClipWebDataset, threshold: float | None) -> Self:
        """For the shards of a dataset.

        Raises:
            ValueError: When some have no scores, or the scores are of other captions.
        """
        layout = dataset.layout.fingerprint
        check_fingerprint(
            {name: table.fingerprint.get(name) for name in layout}, layout, f"the score table in {str(table.folder)!r}"
        )
        lacking = table.lacking(dataset.urls)
        failed = {url: table.failed[public_url(url)] for url in lacking if public_url(url) in table.failed}
        if missing := [public_url(url) for url in lacking if url not in failed]:
            raise ValueError(
                f"{len(missing)} of {len(dataset.urls)} shards have no score table in {str(table.folder)!r}, the first "
                f"is {missing[0]!r}; write them with `clipfilter-wds score`, or leave these shards out"
            )
        return cls(table=table, threshold=threshold, failed=failed)

    def __call__(self, url: str) -> KnownShard:
        """See :data:`~clipfilter_wds.stream.LookUp`.

        Raises:
            ShardError: When the shard could not be scored.
            ValueError: When the table is damaged, or of another shard.
        """
        if url in self.failed:
            raise ShardError(f"it could not be scored: {self.failed[url]}")
        try:
            scores = self.table.read(url)
        except ShardError as error:
            raise ValueError(f"{public_url(url)}: {error}") from error
        if not np.array_equal(scores.table["index"], np.arange(scores.table.num_rows)):
            raise ValueError(f"the score table of {public_url(url)} lacks samples; score the shard again")
        return known_shard(scores, self.threshold)


def known_shard(scores: ShardScores, threshold: float | None) -> KnownShard:
    """What is known of a shard that was scored."""
    table = scores.table
    keep = select(scores, threshold).keep
    rows = zip(
        table["key"].to_pylist(), scores.scores.tolist(), table["reason"].to_pylist(), keep.tolist(), strict=True
    )
    samples = {
        index: KnownSample(key, score, reason and DropReason(reason), kept)
        for index, (key, score, reason, kept) in zip(table["index"].to_pylist(), rows, strict=True)
    }
    return KnownShard(samples=samples, num_samples=table.num_rows)
