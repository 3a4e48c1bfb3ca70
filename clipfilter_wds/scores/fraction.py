"""Finds the lowest score that a fraction of a run's samples reaches, exactly and in little memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: Reads the scores of one shard after another: float32 ``[N]`` each.
ReadScores = Callable[[], Iterable[np.ndarray]]

_HALF_BITS = 16
#: Groups of which each has its histogram.
_MOST_GROUPS = 10_000
_SIGN = np.uint32(1 << 31)


@dataclass(frozen=True, kw_only=True)
class Cutoff:
    """What is kept of one shard when a fraction of the whole run is.

    Attributes:
        score: Higher ones are kept. Infinite when nothing is.
        num_ties: How many of the shard's scores that equal ``score`` are kept as well, those of the lowest index.
        num_ties_dropped: How many of them are not.
    """

    score: float
    num_ties: int
    num_ties_dropped: int = 0

    def keeps(self, scores: np.ndarray) -> np.ndarray:
        """Whether each score of the shard is kept, bool ``[N]``; never one that is not a number."""
        ties = scores == np.float32(self.score)
        kept: np.ndarray = (scores > np.float32(self.score)) | (ties & (np.cumsum(ties) <= self.num_ties))
        return kept


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where the scores that a run keeps end.

    Attributes:
        score: The lowest one that is kept; None when none is.
        num_ties_dropped: How many that equal it are dropped, since the fraction ends among them.
    """

    score: float | None
    num_ties_dropped: int = 0

    @classmethod
    def of(cls, cutoffs: Sequence[Cutoff]) -> "Cut":
        """The cut of a run by the cutoffs of its shards."""
        found = [cutoff for cutoff in cutoffs if np.isfinite(cutoff.score)]
        score = found[0].score if found else None
        return cls(score=score, num_ties_dropped=sum(cutoff.num_ties_dropped for cutoff in found))

    def keeps(self, scores: np.ndarray) -> np.ndarray:
        """Whether each score, float32 ``[N]``, is kept or equals the lowest that is: bool ``[N]``."""
        if self.score is None:
            return np.zeros(len(scores), dtype=bool)
        reached: np.ndarray = scores >= np.float32(self.score)
        return reached

    def describe(self) -> str:
        """Which scores are kept, in a few words."""
        if self.score is None:
            return "no score is kept"
        ties = f"; of those that equal it, {self.num_ties_dropped:,} are not" if self.num_ties_dropped else ""
        return f"scores of at least {self.score!r} are kept{ties}"


def check_fraction(fraction: float, name: str = "keep_fraction") -> float:
    """The fraction, if it is one; else the error calls it by its name.

    Raises:
        ValueError: When it does not lie in [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        hint = f" Did you mean {fraction / 100:g}?" if 1 < fraction <= 100 else ""
        raise ValueError(f"{name} is {fraction:g}; a fraction lies in [0, 1].{hint}")
    return fraction


def find_cutoffs(read: ReadScores, fraction: float) -> list[Cutoff]:
    """Per shard, what to keep so that the ``round(fraction * N)`` highest scores of all shards are kept.

    N counts every score that is a number; of equal ones, those of the first shards are kept, and in a shard those of
    the lowest index. ``round`` is Python's. Memory is that of one shard's scores and a histogram of 2^16 bins: the
    scores are read three times, first for the upper half of their bits, then for the lower half of those that share
    the cutoff's upper half, then for the ties.
    """

    def read_as_one() -> Iterator[dict[str, np.ndarray]]:
        return ({"": scores} for scores in read())

    return [cutoffs[""] for cutoffs in find_group_cutoffs(read_as_one, lambda group: fraction)]


def find_group_cutoffs(
    read: Callable[[], Iterable[Mapping[str, np.ndarray]]], fraction_of: Callable[[str], float]
) -> list[dict[str, Cutoff]]:
    """Per shard and group, what to keep so that of each group its fraction is kept, as :func:`find_cutoffs` does.

    Args:
        read: Reads the scores of one shard after another, by group.
        fraction_of: What is kept of a group. There is a histogram for each.

    Raises:
        ValueError: When there are so many groups that their histograms would fill the memory.
    """
    searches: dict[str, _Search] = {}
    for by_group in read():
        for group, scores in by_group.items():
            searches.setdefault(group, _Search()).count_upper(scores)
        if len(searches) > _MOST_GROUPS:
            raise ValueError(
                f"there are more than {_MOST_GROUPS:,} groups, and each takes half a megabyte of memory; group by a "
                "column of fewer values"
            )
    for group, search in searches.items():
        search.settle_upper(fraction_of(group))
    for by_group in read():
        for group, scores in by_group.items():
            searches[group].count_lower(scores)
    for search in searches.values():
        search.settle_lower()
    return [{group: searches[group].cutoff(scores) for group, scores in by_group.items()} for by_group in read()]


class _Search:
    """Finds the lowest score that is kept, half of its bits after the other."""

    def __init__(self) -> None:
        self._counts = np.zeros(1 << _HALF_BITS, dtype=np.int64)
        self._num_left = self._upper = 0
        self._score: np.float32 | None = None

    def count_upper(self, scores: np.ndarray) -> None:
        """Count the upper halves of a shard's scores."""
        np.add.at(self._counts, _ranks(scores) >> _HALF_BITS, 1)  # a group may have few scores, and its bins are many

    def settle_upper(self, fraction: float) -> None:
        """Find the upper half of the lowest score that is kept."""
        self._num_left = round(fraction * int(self._counts.sum()))
        if self._num_left:
            self._upper, num_above = _bin_of(self._counts, self._num_left)
            self._num_left -= num_above
        self._counts[:] = 0

    def count_lower(self, scores: np.ndarray) -> None:
        """Count the lower halves of those with that upper half."""
        ranks = _ranks(scores)
        np.add.at(self._counts, ranks[ranks >> _HALF_BITS == self._upper] & 0xFFFF, 1)

    def settle_lower(self) -> None:
        """Find the score."""
        if self._num_left:
            lower, num_above = _bin_of(self._counts, self._num_left)
            self._num_left -= num_above
            self._score = _score_of(self._upper << _HALF_BITS | lower)

    def cutoff(self, scores: np.ndarray) -> Cutoff:
        """What is kept of the next shard."""
        if self._score is None:
            return Cutoff(score=np.inf, num_ties=0)
        num_equal = int(np.count_nonzero(scores == self._score))
        num_ties = min(num_equal, self._num_left)
        self._num_left -= num_ties
        return Cutoff(score=float(self._score), num_ties=num_ties, num_ties_dropped=num_equal - num_ties)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """uint32 per score that is a number, in the order of the scores."""
    bits = (scores[~np.isnan(scores)] + np.float32(0.0)).view(np.uint32)  # the sum makes -0.0 the 0.0 that it equals
    ranks: np.ndarray = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return ranks


def _score_of(rank: int) -> np.float32:
    bits = rank ^ int(_SIGN) if rank & int(_SIGN) else rank ^ 0xFFFFFFFF
    score: np.float32 = np.uint32(bits).view(np.float32)
    return score


def _bin_of(counts: np.ndarray, num_kept: int) -> tuple[int, int]:
    """The bin that the ``num_kept``-th highest is in, and how many are above that bin."""
    at_least = counts[::-1].cumsum()[::-1]
    found = int(np.flatnonzero(at_least >= num_kept)[-1])
    return found, int(at_least[found] - counts[found])
