"""Chooses the samples to show: around the threshold, at both ends, and at every score between."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from clipfilter_wds.scores.kind import COSINES
from clipfilter_wds.types import NO_REASON

#: Cosines that lie closer together are alike.
_SPREAD_WIDTH = 0.001

#: float32 ``[N]`` -> bool ``[N]``.
Keeps = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, order=True)
class Pick:
    """A sample to show: its score, its table's number, and its index in the shard."""

    score: float
    table: int
    index: int


class Picker:
    """Chooses samples from tables that are added one at a time, in memory that depends on ``num_picks`` only.

    A fifth of the chosen samples have the lowest scores, a fifth the highest, a fifth the nearest below the threshold
    and a fifth the nearest above it. The rest are spread evenly over the scores, or next to the threshold where all
    scores are alike. Of equal scores, the first is chosen.

    Args:
        threshold: What a score must reach to be kept.
        num_picks: How many samples to choose, if there are that many.
        keeps: Whether each raw score, float32 ``[N]``, is kept; by default when it passes the threshold as a cosine.
        spread_width: Scores that lie closer together are alike.
    """

    def __init__(
        self,
        threshold: float,
        num_picks: int,
        *,
        keeps: Keeps | None = None,
        spread_width: float = _SPREAD_WIDTH,
    ) -> None:
        self._threshold, self._num_picks = threshold, num_picks
        self._keeps = keeps or partial(COSINES.passes, threshold=threshold)
        self._lowest, self._highest, self._below, self._above = (Least(num_picks) for _ in range(4))
        self._spread_width = spread_width
        self._spread: dict[int, Pick] = {}

    def add(self, table: int, scores: np.ndarray, usable: np.ndarray) -> None:
        """Add a table: raw scores, float32 ``[N]``, and which of them are usable, bool ``[N]``."""
        indices = np.nonzero(usable & np.isfinite(scores))[0]
        found = scores[indices].astype(np.float64)
        above = self._keeps(scores[indices])
        self._lowest.add(table, indices, found, costs=found)
        self._highest.add(table, indices, found, costs=-found)
        self._above.add(table, indices[above], found[above], costs=found[above])
        self._below.add(table, indices[~above], found[~above], costs=-found[~above])
        bins, first = np.unique(np.floor(found / self._spread_width).astype(int), return_index=True)
        for number, row in zip(bins.tolist(), first.tolist(), strict=True):
            self._spread.setdefault(number, Pick(float(found[row]), table, int(indices[row])))

    def finish(self) -> list[Pick]:
        """The chosen samples, lowest score first."""
        fifth = self._num_picks // 5
        parts = (self._lowest, self._highest, self._below, self._above)
        chosen = {pick for part in parts for pick in part.picks[:fifth]}
        others = sorted(set(self._spread.values()) - chosen)
        num_others = min(len(others), self._num_picks - len(chosen))
        chosen |= {others[int(row)] for row in np.linspace(0, len(others) - 1, num_others).round()}
        near = sorted(self._below.picks + self._above.picks, key=lambda pick: abs(pick.score - self._threshold))
        near = [pick for pick in near if pick not in chosen]
        return sorted(chosen | set(near[: self._num_picks - len(chosen)]))


class Least:
    """Keeps the ``size`` rows of lowest cost so far."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._costs = np.empty(0)
        self.picks: list[Pick] = []

    def add(self, table: int, indices: np.ndarray, scores: np.ndarray, *, costs: np.ndarray) -> None:
        """Add rows of a table: their indices, scores and costs, ``[N]`` each."""
        if self._size == 0 or not len(costs):
            return
        # Only rows that can be chosen are sorted; the sort is stable, so a tie goes to the earlier row.
        limit = np.partition(costs, self._size - 1)[self._size - 1] if len(costs) > self._size else np.inf
        rows = np.nonzero(costs <= limit)[0]
        rows = rows[np.argsort(costs[rows], kind="stable")][: self._size]
        new = [Pick(float(scores[row]), table, int(indices[row])) for row in rows]
        order = np.argsort(np.concatenate([self._costs, costs[rows]]), kind="stable")[: self._size]
        self._costs = np.concatenate([self._costs, costs[rows]])[order]
        self.picks = [(self.picks + new)[number] for number in order]


class FirstOfEach:
    """Chooses the first ``size`` samples that could not be scored for each reason."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._num_found: Counter[int] = Counter()
        self.picks: list[Pick] = []

    def add(self, table: int, reasons: np.ndarray) -> None:
        """Add a table: per sample the number of its reason, int8 ``[N]``, ``NO_REASON`` where it was scored."""
        for reason in np.setdiff1d(reasons, [NO_REASON]).tolist():
            rows = np.flatnonzero(reasons == reason)[: self._size - self._num_found[reason]]
            self._num_found[reason] += len(rows)
            self.picks += [Pick(0.0, table, int(row)) for row in rows]
