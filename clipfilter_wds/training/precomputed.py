"""Looks up the scores that are known before a shard is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from clipfilter_wds.scores.fingerprint import check_fingerprint
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.types import DropReason, ShardError


class PrecomputedScore(NamedTuple):
    """The score of a sample that is known before the sample is read.

    Attributes:
        key: The sample's.
        score: Raw cosine; 0.0 where there is a ``reason``.
        reason: Why it can't be used, if so.
        keep: Whether it passes the filter. If not, its members are not read.
    """

    key: str
    score: float
    reason: DropReason | None
    keep: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecomputedScores:
    """The scores of a shard that are known before it is read.

    Attributes:
        samples: By index, of all samples or some.
        num_samples: How many the shard holds; None when that is not known.
    """

    samples: Mapping[int, PrecomputedScore]
    num_samples: int | None


#: URL of an open shard -> its scores, as far as they are known. Raises ``ShardError`` when it is not to be used.
ScoreLookup = Callable[[str], PrecomputedScores]


def no_scores(url: str) -> PrecomputedScores:
    """No scores: a :data:`ScoreLookup` for shards that were not scored before."""
    return PrecomputedScores(samples={}, num_samples=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderLookup:
    """Looks up the samples of every shard in its score table; made by the loader, used by the workers.

    Attributes:
        table: Holds the scores.
        threshold: Decides which samples are kept; None keeps all.
        failed: Shards that could not be scored, and why; they are left out.
    """

    table: ScoreFolder
    threshold: float | None
    failed: Mapping[str, str]

    @classmethod
    def of(cls, table: ScoreFolder, urls: Sequence[str], layout: SampleLayout, threshold: float | None) -> Self:
        """For these shards, with captions of this layout.

        Raises:
            ValueError: When some have no scores, or the scores are of other captions.
        """
        check_fingerprint(
            SampleLayout.from_fingerprint(table.fingerprint).fingerprint,
            layout.fingerprint,
            f"the score table in {str(table.folder)!r}",
        )
        lacking = table.lacking(urls)
        failed = {url: table.failed[public_url(url)] for url in lacking if public_url(url) in table.failed}
        if missing := [public_url(url) for url in lacking if url not in failed]:
            raise ValueError(
                f"{len(missing)} of {len(urls)} shards have no score table in {str(table.folder)!r}, the first "
                f"is {missing[0]!r}; write them with `clipfilter-wds score`, or leave these shards out"
            )
        return cls(table=table, threshold=threshold, failed=failed)

    def __call__(self, url: str) -> PrecomputedScores:
        """See :data:`ScoreLookup`.

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
        return precomputed_scores(scores, self.threshold)


def precomputed_scores(scores: ShardScores, threshold: float | None) -> PrecomputedScores:
    """The scores of a shard from its table."""
    table = scores.table
    keep = select(scores, threshold).keep
    rows = zip(
        table["key"].to_pylist(), scores.scores.tolist(), table["reason"].to_pylist(), keep.tolist(), strict=True
    )
    samples = {
        index: PrecomputedScore(key, score, reason and DropReason(reason), kept)
        for index, (key, score, reason, kept) in zip(table["index"].to_pylist(), rows, strict=True)
    }
    return PrecomputedScores(samples=samples, num_samples=table.num_rows)
