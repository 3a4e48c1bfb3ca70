"""Keeps what passes of scored batches, and packs it into training batches."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clipfilter_wds.scores.kind import ScoreKind
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.keep_rate import KeepRateWatch
from clipfilter_wds.training.rebatch import Rebatcher
from clipfilter_wds.training.scoring import Scored
from clipfilter_wds.training.state import LoaderState, Progress

#: Ranks are dealt shuffled shards anew in each epoch. In this many times as many epochs as there are ranks, one of them
#: misses a shard with a probability of less than e^-20.
_NUM_DEALS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A training batch, or the end of the stream, and how far everything was when it was packed.

    Attributes:
        batch: The batch; None at the end.
        state: The loader's state after it.
        progress: How far the stream is.
        num_seen: Samples of this iteration that were scored.
        num_kept: How many of them are kept.
        num_ready: Kept pairs that are in no batch yet.
    """

    batch: dict[str, Any] | None
    state: LoaderState
    progress: Progress
    num_seen: int
    num_kept: int
    num_ready: int


class Packer:
    """Packs what passes of one iteration of a loader, from a state on.

    Args:
        config: The loader's.
        begin: Where the iteration begins.
        has_scores: Whether batches get a column ``score``.
        kind: Of the scores.
        layout: Where image and caption are looked for.

    Attributes:
        progress: How far the stream is.
        watch: Knows the scores seen, for errors.
    """

    def __init__(
        self,
        config: LoaderConfig,
        begin: LoaderState,
        *,
        has_scores: bool,
        kind: ScoreKind,
        layout: SampleLayout,
    ) -> None:
        self._config, self._begin, self._has_scores, self._kind = config, begin, has_scores, kind
        self.progress = begin.progress
        self.watch = KeepRateWatch(config.resolved_threshold, config.starvation_limit, layout)
        self._num_seen = self._num_kept = 0
        self._num_batches = begin.batches
        self._last_kept_epoch = begin.progress.epoch
        self._rebatcher = Rebatcher(config.batch_size, page_locked=torch.cuda.is_available())
        # For each scoring batch that has rows in the rebatcher, its stream and the progress before it.
        self._waiting: deque[tuple[int, Progress]] = deque()

    @property
    def place(self) -> LoaderState:
        """Where the stream continues."""
        return LoaderState(progress=self.progress, epoch=self._begin.epoch)

    def pack(self, batches: Iterable[Scored]) -> Iterator[Packed]:
        """Training batches, as soon as each is full, and the end. After an error it can be called again.

        Raises:
            StarvationError: When nothing is kept.
        """
        for scored in batches:
            self._take_in(scored)
            while self._rebatcher.is_ready:
                yield self._pop()
        if self._rebatcher.num_rows and not self._config.drop_last:
            yield self._pop()
        yield self._packed(None)

    def _take_in(self, scored: Scored) -> None:
        keep, stats = scored.decide(self._config.resolved_threshold, self._kind)
        before = self.progress
        kept, given = stats.kept, before.streams[scored.stream].given
        self.progress = before.advance(scored, stats, given=max(0, given - kept))
        self._num_seen, self._num_kept = self._num_seen + stats.seen, self._num_kept + kept
        self.watch.add(scored.scores, seen=stats.seen, kept=kept, unusable=scored.unusable, ends=scored.ends)
        num_passes = self.progress.topology.num_passes_for_all
        # By then this rank has read all shards. (One more, since the last kept pair may have been early in its epoch,
        # read by a worker that was ahead, and the next may come late.)
        num_passes = 2 if num_passes == 1 else num_passes * _NUM_DEALS
        if kept:
            self._last_kept_epoch = self.progress.epoch
        elif self.progress.epoch - self._last_kept_epoch > num_passes:
            raise self.watch.starved(f"{num_passes} whole epochs left none")
        if kept > given:
            self._push(scored, scored.places[keep][given:], scored.scores[keep][given:])
            self._waiting.append((scored.stream, before))

    def _push(self, scored: Scored, rows: np.ndarray, scores: np.ndarray) -> None:
        columns = scored.columns
        if self._has_scores:
            all_scores = torch.empty(int(rows.max()) + 1, dtype=torch.float32)
            all_scores[rows] = torch.from_numpy(scores)
            columns = {**columns, "score": all_scores}
        self._rebatcher.push(columns, rows)

    def _pop(self) -> Packed:
        batch = self._rebatcher.pop()
        while len(self._waiting) > self._rebatcher.num_pieces:
            self._waiting.popleft()
        self._num_batches += 1
        return self._packed(batch)

    def _packed(self, batch: dict[str, Any] | None) -> Packed:
        progress = self.progress
        if self._waiting:
            stream, before = self._waiting[0]
            progress = before.give(stream, self._rebatcher.num_begun)
        state = LoaderState(progress=progress, epoch=self._begin.epoch, batches=self._num_batches)
        return Packed(
            batch=batch,
            state=state,
            progress=self.progress,
            num_seen=self._num_seen,
            num_kept=self._num_kept,
            num_ready=self._rebatcher.num_rows,
        )
