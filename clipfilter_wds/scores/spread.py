"""Says how the cosines of a run are spread, and what a few thresholds would keep."""

from collections.abc import Iterable, Iterator

import numpy as np

#: Steps that cosines are counted at, in 1.
_STEPS = 10_000
_QUANTILES = (0.1, 0.5, 0.9)
#: Shares that thresholds are found for.
_SHARES = (0.7, 0.5, 0.3, 0.1)


class Spread:
    """How many cosines there are at each step of 0.0001.

    Args:
        scores: Of one shard after another, float32 ``[N]``.
    """

    def __init__(self, scores: Iterable[np.ndarray]) -> None:
        self._counts = np.zeros(2 * _STEPS + 1, dtype=np.int64)
        for some in scores:
            steps = np.floor((np.clip(some.astype(np.float64), -1.0, 1.0) + 1.0) * _STEPS)
            self._counts += np.bincount(steps.astype(np.int64), minlength=len(self._counts))

    @property
    def num_scores(self) -> int:
        """How many there are."""
        return int(self._counts.sum())

    def quantile(self, share: float) -> float:
        """The step below which this share of all lies, at most."""
        return float(np.searchsorted(np.cumsum(self._counts), share * self.num_scores) / _STEPS - 1.0)

    def kept(self, threshold: float) -> float:
        """The share that a threshold, a multiple of 0.0001, keeps."""
        first = 0 if threshold <= 0.0 else round((threshold + 1.0) * _STEPS)  # below 0, cosines count as 0
        return int(self._counts[first:].sum()) / max(self.num_scores, 1)

    def describe(self) -> Iterator[str]:
        """A line of quantiles, and one of thresholds; none where there are no scores."""
        if not self.num_scores:
            return
        yield "scores: " + ", ".join(f"{share:.0%} below {self.quantile(share):.3f}" for share in _QUANTILES)
        thresholds = sorted({max(round(self.quantile(1.0 - share), 2), 0.0) for share in _SHARES})
        yield "thresholds: " + ", ".join(map(self._describe, thresholds))

    def _describe(self, threshold: float) -> str:
        has_negative = threshold <= 0.0 and self._counts[:_STEPS].any()
        why = " (a score below 0 counts as 0)" if has_negative else ""
        return f"{threshold:.2f} keeps {self.kept(threshold):.1%}{why}"
