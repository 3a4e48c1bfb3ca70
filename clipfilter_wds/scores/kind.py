"""Says what kind of score a table holds, and what a threshold means for it. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from clipfilter_wds.options import check_number

#: What a model gives. The fingerprint's entry ``score`` names the kind; tables without the entry hold cosines.
COSINE = "cosine"

#: What suits the kind of score, where nothing is said.
AutoThreshold = Literal["auto"]

#: For cosines. No number suits other kinds.
DEFAULT_THRESHOLD = 0.25


@dataclass(frozen=True)
class ScoreKind:
    """A kind of score.

    Attributes:
        name: The fingerprint's entry ``score``.
        low: The lowest score that there can be, None for no such limit.
        high: The highest, likewise.
    """

    name: str = COSINE
    low: float | None = -1.0
    high: float | None = 1.0

    @property
    def is_cosine(self) -> bool:
        """Whether scores are cosines, which are clipped to [0, 1] before they are compared."""
        return self.name == COSINE

    def resolve_threshold(self, threshold: float | AutoThreshold | None) -> float | None:
        """The threshold as a number, or None where there is none: for cosines, ``auto`` is 0.25.

        Raises:
            ValueError: When it is ``auto`` and scores are no cosines, does not lie in the range of the kind, or is no
                number.
        """
        if threshold is None:
            return None
        if not isinstance(threshold, str):
            return self.check_threshold(threshold)
        if threshold != "auto":
            raise ValueError(f"threshold is {threshold!r}; give a number, 'auto', or None")
        if not self.is_cosine:
            raise ValueError(
                f"the scores are of kind {self.name!r}, which has no usual threshold; give a threshold that suits it, "
                "or, where shards are rewritten, a keep_fraction. The report shows what each threshold keeps"
            )
        return DEFAULT_THRESHOLD

    def check_threshold(self, threshold: float) -> float:
        """The threshold, if a score can lie on both sides of it.

        Raises:
            ValueError: When it does not lie in the range of the kind, or is not a number.
            TypeError: When it is no number, such as text from a file of settings.
        """
        low, high = (-np.inf if self.low is None else self.low), (np.inf if self.high is None else self.high)
        check_number("threshold", threshold)
        if low <= threshold <= high:
            return threshold
        if not self.is_cosine:
            raise ValueError(f"threshold is {threshold:g}; a score of kind {self.name!r} lies in [{low:g}, {high:g}]")
        hint = (
            f" Did you mean {threshold / 10 if threshold < 10 else threshold / 100:g}?" if 1 < threshold <= 100 else ""
        )
        raise ValueError(f"threshold is {threshold:g}; a cosine lies in [-1, 1].{hint}")

    def passes(self, scores: np.ndarray, threshold: float | np.ndarray) -> np.ndarray:
        """Whether each score is kept: of cosines, if ``clip(score, 0, 1) >= threshold``, else if it is at least that.

        Args:
            scores: float32 ``[N]``. One that is not a number is never kept.
            threshold: What they are compared with; one for all, or one for each, float64 ``[N]``.

        Returns:
            bool ``[N]``.
        """
        # In float64, as the reference compares Python floats: in float32 the threshold itself would be rounded.
        compared = scores.astype(np.float64)
        passed: np.ndarray = (np.clip(compared, 0.0, 1.0) if self.is_cosine else compared) >= threshold
        return passed


#: What a model gives.
COSINES = ScoreKind()
