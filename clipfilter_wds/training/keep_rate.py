"""Raises or warns when a filter keeps nothing, or much less than before."""

import logging
from collections import deque

import numpy as np

_log = logging.getLogger(__name__)

#: The latest scoring batches whose keep rate is looked at, and how many times as many must have come before.
_LATELY, _BEFORE = 32, 4
#: The keep rate has collapsed when it is lately less than this share of what it was on average.
_COLLAPSED = 0.2
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class StarvationError(RuntimeError):
    """No sample is kept any more; the message gives the scores seen and the threshold."""


class KeepRateWatch:
    """Raises when too many samples in a row leave none, and warns once when the keep rate collapses.

    Args:
        threshold: For the message.
        starvation_limit: Samples in a row without one that is kept after which to raise.
    """

    def __init__(self, threshold: float | None, starvation_limit: int) -> None:
        self._threshold, self._starvation_limit = threshold, starvation_limit
        self._hungry = 0
        self._lately: deque[tuple[int, int]] = deque(maxlen=_LATELY)
        self._scores: deque[np.ndarray] = deque(maxlen=_LATELY)
        self._num_batches, self._seen, self._kept = 0, 0, 0
        self._warned = False

    def add(self, scores: np.ndarray, *, seen: int, kept: int) -> None:
        """Note a scoring batch.

        Raises:
            StarvationError: When none of the last ``starvation_limit`` samples is kept.
        """
        self._scores.append(scores)
        self._hungry = 0 if kept else self._hungry + seen
        if self._hungry >= self._starvation_limit:
            raise self.starved(f"the last {self._hungry:,} samples left none")
        self._lately.append((seen, kept))
        self._num_batches, self._seen, self._kept = self._num_batches + 1, self._seen + seen, self._kept + kept
        if not self._warned and self._num_batches > _LATELY * _BEFORE:
            self._warn_of_collapse()

    def _warn_of_collapse(self) -> None:
        seen, kept = (sum(counts) for counts in zip(*self._lately, strict=True))
        rate, usual = kept / max(seen, 1), self._kept / max(self._seen, 1)
        if rate < _COLLAPSED * usual:
            self._warned = True
            _log.warning(
                "the filter keeps %.2f %% of late, after %.2f %% on average; has the data changed? %s",
                100 * rate,
                100 * usual,
                self._seen_scores(),
            )

    def starved(self, what: str) -> StarvationError:
        """The error to raise, with what is known of the scores."""
        return StarvationError(
            f"nothing is kept: {what}. {self._seen_scores()} "
            "Lower the threshold, or check that shards, captions and model belong together"
        )

    def _seen_scores(self) -> str:
        scores = np.concatenate(self._scores) if self._scores else np.empty(0)
        if not len(scores):
            return f"No sample could be scored; the threshold is {self._threshold}."
        values = zip(_QUANTILES, np.quantile(scores, _QUANTILES), strict=True)
        quantiles = ", ".join(f"{quantile:.0%}: {value:.3f}" for quantile, value in values)
        return f"The threshold is {self._threshold}, quantiles of the last {len(scores):,} scores are {quantiles}."
