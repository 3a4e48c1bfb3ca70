"""Finds shards whose keep rate stands out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Robust standard deviations from the median beyond which a shard is an outlier (Iglewicz and Hoaglin, 1993).
OUTLIER_DEVIATIONS = 3.5

_MIN_SHARDS = 4
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True, kw_only=True)
class ShardRate:
    """What is known of a shard.

    Attributes:
        name: Its name in the run's output, without suffix.
        seen: How many samples it has.
        kept: How many of them the report's threshold keeps.
        torn: Whether it is damaged or cut.
        num_ties: How many of its scores equal the run's cut.
        scored: How many of its samples could be scored.
        median: Of their scores; None where there is none.
    """

    name: str
    seen: int
    kept: int
    torn: bool
    num_ties: int = 0
    scored: int = 0
    median: float | None = None

    @property
    def rate(self) -> float:
        """Share of the seen samples that is kept, NaN for an empty shard."""
        return self.kept / self.seen if self.seen else float("nan")


def outliers(shards: Sequence[ShardRate]) -> list[bool]:
    """Whether each shard's keep rate is far from the median of all shards.

    Far means by more than ``OUTLIER_DEVIATIONS`` times the larger of two spreads: that between shards (from the median
    absolute deviation, which outliers don't widen), and the one that chance alone gives a shard of this size.
    """
    rates = np.array([shard.rate for shard in shards])
    seen = np.array([shard.seen for shard in shards])
    holds = seen > 0
    if holds.sum() < _MIN_SHARDS:
        return [False] * len(shards)
    median = np.median(rates[holds])
    between = _MAD_TO_SIGMA * np.median(np.abs(rates[holds] - median))
    size = np.maximum(seen, 1)
    # Not 0 or 1, where a binomial distribution has no spread.
    share = np.clip(median, 0.5 / size, 1 - 0.5 / size)
    by_chance = np.sqrt(share * (1 - share) / size)
    far = np.abs(rates - median) > OUTLIER_DEVIATIONS * np.maximum(between, by_chance)
    return [bool(flag) for flag in far & holds]
