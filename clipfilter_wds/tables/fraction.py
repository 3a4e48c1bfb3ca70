"""Keeps the rows of a table with the highest scores."""

from array import array
from dataclasses import dataclass, field

import numpy as np

from clipfilter_wds.scores.fraction import Cut, Cutoff, find_cutoffs
from clipfilter_wds.tables.scoring import PairScores
from clipfilter_wds.types import NO_REASON, REASON_CODES, DropReason

_REASONS = list(DropReason)


@dataclass
class ScoredTable:
    """Remembers the scores of all rows, in five bytes each, until it is known which are among the highest."""

    _similarity: "array[float]" = field(default_factory=lambda: array("f"))
    _reasons: "array[int]" = field(default_factory=lambda: array("b"))
    _num_truncated: int = 0

    def add(self, scores: PairScores) -> None:
        """Append a run of rows."""
        self._similarity.frombytes(scores.similarity.astype(np.float32).tobytes())
        self._reasons.extend(NO_REASON if reason is None else REASON_CODES[reason] for reason in scores.reasons)
        self._num_truncated += scores.num_truncated

    def decide(self, fraction: float) -> "DecidedTable":
        """Choose the ``round(fraction * N)`` highest of the N scores; of equal ones, those of the first rows."""
        similarity = np.frombuffer(self._similarity, dtype=np.float32)
        reasons = np.frombuffer(self._reasons, dtype=np.int8)
        scores = np.where(reasons == NO_REASON, similarity, np.float32(np.nan))
        (cutoff,) = find_cutoffs(lambda: [scores], fraction)
        return DecidedTable(similarity, reasons, cutoff.keeps(scores), cutoff, self._num_truncated)


@dataclass(frozen=True, eq=False)
class DecidedTable:
    """Which rows are kept.

    Attributes:
        similarity: float32 ``[N]``.
        reasons: int8 ``[N]``: ``NO_REASON``, or the position of the reason in ``DropReason``.
        keep: bool ``[N]``.
        cutoff: The lowest score that is kept.
        num_truncated: How many captions were longer than the text tower takes.
    """

    similarity: np.ndarray
    reasons: np.ndarray
    keep: np.ndarray
    cutoff: Cutoff
    num_truncated: int

    def between(self, start: int, stop: int) -> tuple[PairScores, np.ndarray]:
        """The scores of a run of rows, and which of them are kept."""
        reasons = [None if code == NO_REASON else _REASONS[code] for code in self.reasons[start:stop].tolist()]
        scores = PairScores(similarity=self.similarity[start:stop], reasons=reasons, num_truncated=0)
        return scores, self.keep[start:stop]

    def describe(self, fraction: float) -> str:
        """Which scores are kept."""
        num_kept, num_scored = int(self.keep.sum()), int((self.reasons == NO_REASON).sum())
        cut = Cut.of([self.cutoff]).describe()
        return f"cut: {cut} ({num_kept:,} of {num_scored:,} scores, keep_fraction {fraction:g})"
