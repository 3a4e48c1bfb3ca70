"""Counts scores at fixed fine steps, in memory that doesn't grow with the number of scores."""

import numpy as np

#: Steps per unit of cosine: thresholds are multiples of 0.0001.
STEPS = 10_000

# k / STEPS is the float64 nearest to that decimal number, so the count at 0.25 is that of `score >= 0.25`.
_GRID = np.arange(-STEPS, STEPS + 1) / STEPS


class ScoreCounts:
    """Counts exactly how many scores reach each threshold that is a multiple of 0.0001.

    Attributes:
        lowest: The lowest score so far, infinity when there is none.
        highest: The highest score so far, minus infinity when there is none.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(len(_GRID) + 1, dtype=np.int64)
        self.lowest, self.highest = np.inf, -np.inf

    def add(self, scores: np.ndarray) -> None:
        """Count raw cosines, float32 ``[N]``. NaNs reach no threshold and are left out."""
        numbers = np.clip(scores[~np.isnan(scores)].astype(np.float64), -1.0, 1.0)
        if len(numbers):
            steps_reached = np.searchsorted(_GRID, numbers, side="right")
            self._counts += np.bincount(steps_reached, minlength=len(self._counts))
            self.lowest = min(self.lowest, float(numbers.min()))
            self.highest = max(self.highest, float(numbers.max()))

    def at_least(self, first: int, last: int) -> list[int]:
        """How many scores are at least ``k / STEPS``, for each ``k`` from ``first`` to ``last``."""
        reached = np.cumsum(self._counts[::-1])[::-1][1:]
        counts: list[int] = reached[first + STEPS : last + STEPS + 1].tolist()
        return counts

    @property
    def total(self) -> int:
        """How many scores were counted."""
        return int(self._counts.sum())
