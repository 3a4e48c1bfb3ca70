"""Raises or warns when a filter keeps nothing, or much less than before."""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np

from clipfilter_wds.shards.lacking import describe_lacking
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.stream import PartEnd
from clipfilter_wds.types import DropReason

_log = logging.getLogger(__name__)

#: The latest scoring batches whose keep rate is looked at, and how many times as many must have come before.
_LATELY, _BEFORE = 32, 4
#: The keep rate has collapsed when it is lately less than this share of what it was on average.
_COLLAPSED = 0.2
#: How many would have been kept lately at that average, at least; of fewer, chance makes less than that share.
_EXPECTED = 20
#: The members of samples are named when so large a share of what was dropped lacks an image or a caption.
_LACKING = 0.9
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class StarvationError(RuntimeError):
    """No sample is kept any more; the message gives the scores seen and the threshold."""


class KeepRateWatch:
    """Raises when too many samples in a row leave none, and warns once when the keep rate collapses.

    Args:
        threshold: For the message.
        starvation_limit: Samples in a row without one that is kept after which to raise.
        layout: Where image and caption are looked for; None where samples don't come from shards.
    """

    def __init__(self, threshold: float | None, starvation_limit: int, layout: SampleLayout | None = None) -> None:
        self._threshold, self._starvation_limit, self._layout = threshold, starvation_limit, layout or SampleLayout()
        self._hungry = _Hungry()
        self._lately: deque[tuple[int, int]] = deque(maxlen=_LATELY)
        self._scores: deque[np.ndarray] = deque(maxlen=_LATELY)
        self._num_batches, self._seen, self._kept = 0, 0, 0
        self._warned = False

    def add(
        self,
        scores: np.ndarray,
        *,
        seen: int,
        kept: int,
        unusable: Mapping[DropReason, int] = MappingProxyType({}),
        ends: Iterable[PartEnd] = (),
    ) -> None:
        """Note a scoring batch.

        Args:
            scores: Of the samples that could be scored.
            seen: How many samples there are.
            kept: How many of them are kept.
            unusable: How many could not be scored, by reason.
            ends: Shards that ended here.

        Raises:
            StarvationError: When none of the last ``starvation_limit`` samples is kept.
        """
        if seen:
            self._scores.append(scores)
        if kept:
            self._hungry = _Hungry()
        else:
            self._hungry.add(seen, unusable, ends)
        if self._hungry.num_samples >= self._starvation_limit:
            raise self.starved(f"the last {self._hungry.num_samples:,} samples left none")
        if not seen:  # as where a stream ends
            return
        self._lately.append((seen, kept))
        self._num_batches, self._seen, self._kept = self._num_batches + 1, self._seen + seen, self._kept + kept
        if not self._warned and self._num_batches > _LATELY * _BEFORE:
            self._warn_of_collapse()

    def _warn_of_collapse(self) -> None:
        seen, kept = (sum(counts) for counts in zip(*self._lately, strict=True))
        rate, usual = kept / max(seen, 1), self._kept / max(self._seen, 1)
        if rate < _COLLAPSED * usual and seen * usual >= _EXPECTED:
            self._warned = True
            _log.warning(
                "the filter keeps %.2f %% of late, after %.2f %% on average; has the data changed? %s",
                100 * rate,
                100 * usual,
                self._seen_scores(),
            )

    def starved(self, what: str) -> StarvationError:
        """The error to raise, with what is known of the scores."""
        if not self._seen and not self._hungry.num_samples:
            return StarvationError(
                f"nothing is kept: {what}. No sample was read: the shards are empty or can't be used, or what is "
                "filtered is an iterator, which gives its batches only once"
            )
        cure = "Lower the threshold, or check that shards, captions and model belong together"
        return StarvationError(
            f"nothing is kept: {what}. {self._seen_scores()} {self._hungry.lacking(self._layout) or cure}"
        )

    def _seen_scores(self) -> str:
        scores = np.concatenate(self._scores) if self._scores else np.empty(0)
        if not len(scores):
            return f"No sample could be scored; the threshold is {self._threshold}."
        values = zip(_QUANTILES, np.quantile(scores, _QUANTILES), strict=True)
        quantiles = ", ".join(f"{quantile:.0%}: {value:.3f}" for quantile, value in values)
        return f"The threshold is {self._threshold}, quantiles of the last {len(scores):,} scores are {quantiles}."


class _Hungry:
    """The samples in a row of which none is kept."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._unusable: Counter[DropReason] = Counter()
        # What ended shards hold; several workers may share one.
        self._ended: set[str] = set()
        self._members: Counter[str] = Counter()
        self._num_whole = 0

    def add(self, seen: int, unusable: Mapping[DropReason, int], ends: Iterable[PartEnd]) -> None:
        self.num_samples += seen
        self._unusable.update(unusable)
        for part in ends:
            if part.url not in self._ended:
                self._ended.add(part.url)
                self._members.update(part.end.members)
                self._num_whole += part.end.num_samples

    def lacking(self, layout: SampleLayout) -> str | None:
        """What nearly all samples lack, and what would help; None where that is not so, or no shard has ended."""

        def write(options: Mapping[str, str]) -> str:
            return f"layout=SampleLayout({', '.join(f'{name}={value!r}' for name, value in options.items())})"

        num_lacking = self._unusable[DropReason.MISSING_IMAGE] + self._unusable[DropReason.MISSING_CAPTION]
        if not self._members or num_lacking <= _LACKING * self.num_samples:
            return None
        return describe_lacking(num_lacking, self.num_samples, self._members, layout, write, num_whole=self._num_whole)
