"""Scores -> keep or drop, with a reason."""

from dataclasses import dataclass

import numpy as np

from clipfilter_wds.scores import ShardScores
from clipfilter_wds.types import DropReason, FilterStats

DEFAULT_THRESHOLD = 0.25


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """What is kept of a shard: bool ``[num_samples]``, and the counts."""

    keep: np.ndarray
    stats: FilterStats


def check_threshold(threshold: float) -> float:
    """The threshold, if a cosine can lie on both sides of it.

    Raises:
        ValueError: When it does not lie in [-1, 1].
    """
    if not -1.0 <= threshold <= 1.0:
        hint = (
            f" Did you mean {threshold / 10 if threshold < 10 else threshold / 100:g}?" if 1 < threshold <= 100 else ""
        )
        raise ValueError(f"threshold is {threshold:g}; a cosine lies in [-1, 1].{hint}")
    return threshold


def passes(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Whether ``clip(score, 0, 1) >= threshold``, for raw cosines, float32 ``[N]``; never for what is not a number."""
    # In float64, as the reference compares Python floats: in float32 the threshold itself would be rounded.
    passed: np.ndarray = np.clip(scores.astype(np.float64), 0.0, 1.0) >= threshold
    return passed


def select(scores: ShardScores, threshold: float | None) -> Selection:
    """Keep what could be scored and has ``clip(score, 0, 1) >= threshold``; None keeps all that could be scored.

    A score that is not a number is never kept. Samples that could not be scored are dropped whatever the threshold.
    """
    keep = scores.usable
    dropped = dict(scores.dropped)
    if threshold is not None:
        keep = keep & passes(scores.scores, threshold)
        dropped[DropReason.BELOW_THRESHOLD] = int(scores.usable.sum() - keep.sum())
    dropped = {reason: dropped[reason] for reason in DropReason if dropped.get(reason)}
    return Selection(keep=keep, stats=FilterStats(seen=scores.table.num_rows, kept=int(keep.sum()), dropped=dropped))
