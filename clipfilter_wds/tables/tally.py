"""Counts what became of a table's pairs."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from clipfilter_wds.tables.images import shown_name
from clipfilter_wds.tables.scoring import Pair, PairScores
from clipfilter_wds.types import DropReason, FilterStats


@dataclass(kw_only=True)
class PairTally:
    """What became of a table's pairs.

    Attributes:
        counts: Pairs seen, kept, and dropped by reason.
        unusable: Per reason, how many pairs could not be scored and got similarity 0.0, kept ones included.
        first: Per such reason, the first pair that has it: row number, counting from 0, and image.
        truncated_captions: How many captions were longer than the text tower takes.
        cutoff: Where a fraction of the scores is kept, a line that says which.
        started: When scoring began, by ``time.perf_counter``.
    """

    counts: FilterStats = field(default_factory=FilterStats)
    unusable: dict[DropReason, int] = field(default_factory=dict)
    first: dict[DropReason, tuple[int, str | None]] = field(default_factory=dict)
    truncated_captions: int = 0
    cutoff: str | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since scoring began."""
        return time.perf_counter() - self.started

    def add(self, pairs: Sequence[Pair], scores: PairScores, keep: np.ndarray) -> None:
        """Count a batch: the pairs, their scores and which of them are kept."""
        dropped: dict[DropReason, int] = {}
        for row, (pair, reason, kept) in enumerate(zip(pairs, scores.reasons, keep, strict=True), self.counts.seen):
            if reason is not None:
                self.unusable[reason] = self.unusable.get(reason, 0) + 1
                self.first.setdefault(reason, (row, pair.image))
            if not kept:
                reason = reason or DropReason.BELOW_THRESHOLD
                dropped[reason] = dropped.get(reason, 0) + 1
        self.counts += FilterStats(seen=len(pairs), kept=int(keep.sum()), dropped=dropped)
        self.truncated_captions += scores.num_truncated

    def describe_unusable(self) -> Iterator[str]:
        """One line per reason for which pairs could not be scored."""
        for reason in sorted(self.unusable):
            row, image = self.first[reason]
            yield f"{reason}: {self.unusable[reason]:,}, the first in row {row:,} (image {shown_name(image)})"

    def log(self, logger: logging.Logger) -> None:
        """Log what could not be scored, once per reason."""
        for line in self.describe_unusable():
            logger.warning("scored 0.0 of %s pairs as %s", f"{self.counts.seen:,}", line)
