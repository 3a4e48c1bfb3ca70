"""Counts scores at fixed fine steps, in memory that doesn't grow with the number of scores."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from clipfilter_wds.scores.fraction import ReadScores
from clipfilter_wds.scores.kind import ScoreKind

#: Steps per unit of cosine: thresholds are multiples of 0.0001.
STEPS = 10_000

#: Scores of other kinds are counted at so many steps at most, and at a tenth of that at least.
_MOST_STEPS = 10_000


@dataclass(frozen=True)
class Grid:
    """Where scores are counted: at ``k / steps``, for each ``k`` from ``first`` to ``last``.

    Attributes:
        steps: Per unit of score, a power of ten.
        first: The lowest step.
        last: The highest step.
    """

    steps: float = STEPS
    first: int = -STEPS
    last: int = STEPS

    @classmethod
    def over(cls, lowest: float, highest: float) -> Self:
        """For scores between these."""
        span = max(highest - lowest, 1e-6 * max(abs(lowest), abs(highest)), 1e-9)
        exponent = math.floor(math.log10(_MOST_STEPS / span))
        steps = 10**exponent if exponent >= 0 else 1 / 10**-exponent
        return cls(steps, math.floor(lowest * steps) - 1, math.ceil(highest * steps) + 1)

    @property
    def values(self) -> np.ndarray:
        """float64 ``[last - first + 1]``: the scores at the steps."""
        # k / steps is the float64 nearest to that decimal number, so the count at 0.25 is that of `score >= 0.25`.
        return np.arange(self.first, self.last + 1) / self.steps


COSINE_GRID = Grid()


def grid_of(kind: ScoreKind, read: ReadScores) -> Grid:
    """Where scores are counted: cosines at every 0.0001, others between the lowest and the highest.

    Args:
        kind: Of the scores.
        read: Reads them, float32 ``[N]`` at a time.
    """
    if kind.is_cosine:
        return COSINE_GRID
    ends = [(float(scores.min()), float(scores.max())) for scores in read() if len(scores)]
    return Grid.over(min((low for low, _ in ends), default=0.0), max((high for _, high in ends), default=0.0))


class ScoreCounts:
    """Counts exactly how many scores reach each threshold that is a step of a grid.

    Args:
        grid: The steps; those of cosines by default. Scores beyond its ends count as if they were there.

    Attributes:
        lowest: The lowest score so far, infinity when there is none.
        highest: The highest score so far, minus infinity when there is none.
    """

    def __init__(self, grid: Grid = COSINE_GRID) -> None:
        self.grid, self._values = grid, grid.values
        self._counts = np.zeros(len(self._values) + 1, dtype=np.int64)
        self.lowest, self.highest = np.inf, -np.inf

    def add(self, scores: np.ndarray) -> None:
        """Count raw scores, float32 ``[N]``. NaNs reach no threshold and are left out."""
        numbers = np.clip(scores[~np.isnan(scores)].astype(np.float64), self._values[0], self._values[-1])
        if len(numbers):
            steps_reached = np.searchsorted(self._values, numbers, side="right")
            self._counts += np.bincount(steps_reached, minlength=len(self._counts))
            self.lowest = min(self.lowest, float(numbers.min()))
            self.highest = max(self.highest, float(numbers.max()))

    def at_least(self, first: int, last: int) -> list[int]:
        """How many scores are at least ``k / steps``, for each ``k`` from ``first`` to ``last``."""
        reached = np.cumsum(self._counts[::-1])[::-1][1:]
        counts: list[int] = reached[first - self.grid.first : last - self.grid.first + 1].tolist()
        return counts

    def shares_below(self, scores: np.ndarray) -> np.ndarray:
        """Per score, float32 ``[N]``, the share of the counted ones that don't reach its step: float64 ``[N]``."""
        reached = np.cumsum(self._counts[::-1])[::-1]
        steps = np.searchsorted(self._values, scores.astype(np.float64), side="right")
        shares: np.ndarray = 1.0 - reached[steps] / max(self.total, 1)
        return shares

    @property
    def total(self) -> int:
        """How many scores were counted."""
        return int(self._counts.sum())
