"""Keeps or drops samples by their scores, with a reason."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfilter_wds.preprocess.rows import count_reasons
from clipfilter_wds.scores.fraction import Cutoff, check_fraction
from clipfilter_wds.scores.groups import GroupCutoffs, Groups, rows_by_group
from clipfilter_wds.scores.kind import COSINES, ScoreKind
from clipfilter_wds.scores.subset import Subset
from clipfilter_wds.scores.where import Where
from clipfilter_wds.types import NO_REASON, REASON_CODES, DropReason, FilterStats, ShardError

if TYPE_CHECKING:  # a config holds a choice, and pyarrow takes a tenth of a second to import
    from clipfilter_wds.scores.table import ShardScores

#: What a fraction comes to for one shard.
AnyCutoff = Cutoff | GroupCutoffs


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

    def digest(self, start: int = 0, stop: int | None = None) -> str:
        """What tells this outcome of the samples with ``start <= index < stop``, by default of all, from another."""
        return hashlib.sha256(self.reasons[start:stop].tobytes()).hexdigest()

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
        groups: Groups with limits of their own; a fraction is one of each group.

    Raises:
        ValueError: When one of them can't be used, or they contradict each other.
    """

    threshold: float | None = None
    keep_fraction: float | None = None
    subset: Subset | None = None
    kind: ScoreKind = COSINES
    where: Where | None = None
    groups: Groups | None = None

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
        if self.groups is not None and self.threshold is None and self.keep_fraction is None:
            raise ValueError("group_by needs a threshold or keep_fraction, for the groups that group_limits leaves out")
        if self.groups is not None and self.keep_fraction is None and not self.groups.limits:
            raise ValueError(
                f"group_by {self.groups.column!r} changes nothing where one threshold is for all groups; give some a "
                "threshold of their own with group_limits, such as en=0.3, or give keep_fraction instead of a threshold"
            )
        for limit in self.groups.limits.values() if self.groups is not None else ():
            check_fraction(limit, "a group's limit") if self.threshold is None else self.kind.check_threshold(limit)

    @property
    def settings(self) -> dict[str, Any]:
        """What it is, ready for JSON."""
        subset = None if self.subset is None else self.subset.digest
        where = None if self.where is None else self.where.text
        groups = None if self.groups is None else {"column": self.groups.column, "limits": dict(self.groups.limits)}
        limits = {"threshold": self.threshold, "keep_fraction": self.keep_fraction}
        return {**limits, "subset": subset, "where": where, "groups": groups}

    @property
    def needs_columns(self) -> bool:
        """Whether it takes more of a table than its scores, which a table may lack."""
        return self.subset is not None or self.where is not None or self.groups is not None

    @property
    def uses_further_columns(self) -> bool:
        """Whether columns decide that somebody may have joined to the tables, and may join anew."""
        return self.where is not None or self.groups is not None

    def candidates(self, scores: "ShardScores") -> np.ndarray:
        """The scores, float32 ``[N]``, of a shard's samples that the fraction is of."""
        candidates: np.ndarray = scores.scores[self._are_candidates(scores)]
        return candidates

    def _are_candidates(self, scores: "ShardScores") -> np.ndarray:
        return select(scores, None, subset=self.subset, where=self.where).keep

    def candidates_by_group(self, scores: "ShardScores") -> dict[str, np.ndarray]:
        """The same, by group; in one group, called "", where there are none."""
        if self.groups is None:
            return {"": self.candidates(scores)}
        are_candidates, groups = self._are_candidates(scores), self.groups.of(scores)
        found = scores.scores
        return {group: found[rows][are_candidates[rows]] for group, rows in rows_by_group(groups).items()}

    def fraction_of(self, group: str) -> float:
        """What is kept of a group."""
        assert self.keep_fraction is not None
        return self.keep_fraction if self.groups is None else self.groups.limits.get(group, self.keep_fraction)

    def num_in_band(self, scores: "ShardScores", cutoff: AnyCutoff | None) -> int:
        """How many candidates of a shard score so near the threshold or cutoff that float32 might decide otherwise.

        None where the scores were rechecked at this very threshold. At another limit this is an upper bound: scores
        that were computed again in float32 count as well.
        """
        band, rechecked_at = scores.metadata.band, scores.metadata.rechecked_at
        if band == 0.0:
            return 0
        num_in_band = 0
        for group, candidates in self.candidates_by_group(scores).items():
            limit = self._limit_of(group, cutoff)
            if limit is not None and (cutoff is not None or limit != rechecked_at):
                num_in_band += int((np.abs(candidates.astype(np.float64) - limit) <= band).sum())
        return num_in_band

    def _limit_of(self, group: str, cutoff: AnyCutoff | None) -> float | None:
        if isinstance(cutoff, GroupCutoffs):
            return cutoff.by_group[group].score
        if cutoff is not None:
            return cutoff.score
        return self.threshold if self.groups is None else self.groups.limits.get(group, self.threshold or 0.0)

    def select(self, scores: "ShardScores", cutoff: AnyCutoff | None) -> Selection:
        """Keep or drop the samples of a shard. ``cutoff`` is the shard's, when there is a ``keep_fraction``."""
        assert (cutoff is None) == (self.keep_fraction is None)
        return select(scores, self.threshold, cutoff=cutoff, subset=self.subset, where=self.where, groups=self.groups)


def select(
    scores: "ShardScores",
    threshold: float | None,
    *,
    cutoff: AnyCutoff | None = None,
    subset: Subset | None = None,
    where: Where | None = None,
    groups: Groups | None = None,
) -> Selection:
    """Keep what could be scored, passes and is in the subset.

    A score that is not a number never passes. Samples that could not be scored are dropped whatever the threshold.

    Args:
        scores: Of one shard.
        threshold: Keep what passes it, as the kind of the scores has it; None sets none.
        cutoff: Keep what is among the run's highest scores; None for no such limit.
        subset: Keep what is listed; None for no such limit.
        where: Keep what meets this condition; None for no such limit.
        groups: Groups with thresholds of their own, or those that the cutoff is for.

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
        limits = threshold if groups is None else groups.limits_of(groups.of(scores), threshold)
        passed = scores.metadata.kind.passes(scores.scores, limits)
        reasons[(reasons == NO_REASON) & ~passed] = REASON_CODES[DropReason.BELOW_THRESHOLD]
    if cutoff is not None:
        candidates = np.flatnonzero(reasons == NO_REASON)
        found = scores.scores[candidates]
        if isinstance(cutoff, GroupCutoffs):
            assert groups is not None
            low = candidates[~cutoff.keeps(found, groups.of(scores)[candidates])]
        else:
            low = candidates[~cutoff.keeps(found)]
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
