"""Keeps or drops samples by their scores, with a reason."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfilter_wds.preprocess.rows import count_reasons
from clipfilter_wds.scores.fraction import Cutoff, check_fraction
from clipfilter_wds.scores.kind import COSINES, ScoreKind
from clipfilter_wds.scores.subset import Subset
from clipfilter_wds.scores.where import Where
from clipfilter_wds.types import NO_REASON, REASON_CODES, DropReason, FilterStats, ShardError

if TYPE_CHECKING:  # a config holds a choice, and pyarrow takes a tenth of a second to import
    from clipfilter_wds.scores.table import ShardScores


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What is kept of a shard.

    Attributes:
        reasons: int8 ``[num_samples]``: ``NO_REASON`` for what is kept; for the others, the
            position of the reason in ``DropReason``.
    """

    reasons: np.ndarray

    @property
    def keep(self) -> np.ndarray:
        """Whether each sample is kept: bool ``[num_samples]``."""
        keep: np.ndarray = self.reasons == NO_REASON
        return keep

    @property
    def stats(self) -> FilterStats:
        """The counts."""
        return self.stats_between(0, len(self.reasons))

    def stats_between(self, start: int, stop: int) -> FilterStats:
        """The counts of the samples with ``start <= index < stop``."""
        reasons = self.reasons[start:stop]
        dropped = count_reasons(reasons)
        return FilterStats(seen=len(reasons), kept=int((reasons == NO_REASON).sum()), dropped=dropped)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a run keeps of the pairs that could be scored. Picklable.

    Attributes:
        threshold: Keep what passes it; see ``ScoreKind.passes``. None sets none.
        keep_fraction: Keep this share of all, those with the highest scores; None for no such limit.
        subset: Keep what is listed only.
        kind: Of the scores.
        where: Keep what meets this condition only.

    Raises:
        ValueError: When one of them can't be used, or they contradict each other.
    """

    threshold: float | None = None
    keep_fraction: float | None = None
    subset: Subset | None = None
    kind: ScoreKind = COSINES
    where: Where | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and self.keep_fraction is not None:
            raise ValueError(
                f"threshold {self.threshold:g} and keep_fraction {self.keep_fraction:g} both say which scores to keep; "
                "give one"
            )
        if self.threshold is not None:
            self.kind.check_threshold(self.threshold)
        if self.keep_fraction is not None:
            check_fraction(self.keep_fraction)

    @property
    def settings(self) -> dict[str, Any]:
        """What it is, ready for JSON."""
        subset = None if self.subset is None else self.subset.digest
        where = None if self.where is None else self.where.text
        return {"threshold": self.threshold, "keep_fraction": self.keep_fraction, "subset": subset, "where": where}

    @property
    def is_among(self) -> bool:
        """Whether it is made among some of the samples, and not of all that could be scored."""
        return self.subset is not None or self.where is not None

    def candidates(self, scores: "ShardScores") -> np.ndarray:
        """The scores, float32 ``[N]``, of a shard's samples that the fraction is of."""
        candidates: np.ndarray = scores.scores[select(scores, None, subset=self.subset, where=self.where).keep]
        return candidates

    def num_in_band(self, scores: "ShardScores", cutoff: Cutoff | None) -> int:
        """How many candidates of a shard score so near the threshold or cutoff that float32 might decide otherwise.

        None where the scores were rechecked at this very threshold. At another limit this is an upper bound: scores
        that were computed again in float32 count as well.
        """
        limit, band = self.threshold if cutoff is None else cutoff.score, scores.metadata.band
        if band == 0.0 or limit is None or (cutoff is None and limit == scores.metadata.rechecked_at):
            return 0
        return int((np.abs(self.candidates(scores).astype(np.float64) - limit) <= band).sum())

    def select(self, scores: "ShardScores", cutoff: Cutoff | None) -> Selection:
        """Keep or drop the samples of a shard. ``cutoff`` is the shard's, when there is a ``keep_fraction``."""
        assert (cutoff is None) == (self.keep_fraction is None)
        return select(scores, self.threshold, cutoff=cutoff, subset=self.subset, where=self.where)


def select(
    scores: "ShardScores",
    threshold: float | None,
    *,
    cutoff: Cutoff | None = None,
    subset: Subset | None = None,
    where: Where | None = None,
) -> Selection:
    """Keep what could be scored, passes and is in the subset.

    A score that is not a number never passes. Samples that could not be scored are dropped whatever the threshold.

    Args:
        scores: Of one shard.
        threshold: Keep what passes it, as the kind of the scores has it; None sets none.
        cutoff: Keep what is among the run's highest scores; None for no such limit.
        subset: Keep what is listed; None for no such limit.
        where: Keep what meets this condition; None for no such limit.

    Raises:
        ShardError: When the subset lists uids and no sample of the shard has one, or the table lacks a column of the
            condition.
    """
    reasons = scores.reasons
    if subset is not None:
        # A sample that was not read is dropped for that: nobody knows what it is.
        is_read = ~np.isin(reasons, [REASON_CODES[DropReason.TORN], REASON_CODES[DropReason.MEMBER_TOO_LARGE]])
        reasons[is_read & ~_listed(scores, subset, is_read)] = REASON_CODES[DropReason.NOT_IN_SUBSET]
    if where is not None:
        reasons[(reasons == NO_REASON) & ~_meets(scores, where)] = REASON_CODES[DropReason.NOT_SELECTED]
    if threshold is not None:
        passed = scores.metadata.kind.passes(scores.scores, threshold)
        reasons[(reasons == NO_REASON) & ~passed] = REASON_CODES[DropReason.BELOW_THRESHOLD]
    if cutoff is not None:
        candidates = np.flatnonzero(reasons == NO_REASON)
        low = candidates[~cutoff.keeps(scores.scores[candidates])]
        reasons[low] = REASON_CODES[DropReason.BELOW_THRESHOLD]
    return Selection(reasons=reasons)


def _meets(scores: "ShardScores", where: Where) -> np.ndarray:
    try:
        return where.selects(scores.table)
    except ValueError as error:
        raise ShardError(str(error)) from None


def _listed(scores: "ShardScores", subset: Subset, is_read: np.ndarray) -> np.ndarray:
    uids = scores.uids
    if subset.by_uid and is_read.any() and not any(uids):
        raise ShardError(
            f"subset {str(subset.path)!r} lists uids, and none of the samples has one: 32 hexadecimal digits, "
            "as 'uid' in its json member"
        )
    return subset.holds(scores.keys, uids)
