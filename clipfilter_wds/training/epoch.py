"""Runs one epoch of a loader: keeps what passes of its scored batches, and packs it into training batches."""

from collections import Counter, deque
from typing import Any

import numpy as np
import torch

from clipfilter_wds.scores.selection import passes
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.keep_rate import KeepRateWatch
from clipfilter_wds.training.rebatch import Rebatcher, take
from clipfilter_wds.training.scoring import Scored
from clipfilter_wds.training.source import BatchSource
from clipfilter_wds.training.state import LoaderState, Progress
from clipfilter_wds.types import DropReason, FilterStats
from clipfilter_wds.world import World


class Epoch:
    """One iteration of a loader, from a state on.

    Args:
        source: Gives scored batches.
        config: The loader's.
        world: This rank among all.
        begin: Where the iteration begins.

    Attributes:
        world: This rank among all.
        begun_at: Where the iteration began.
        progress: How far the stream is.
        num_seen: Samples of this iteration that were scored.
        num_kept: How many of them are kept.
        watch: Knows the scores seen, for errors.
    """

    def __init__(self, source: BatchSource, config: LoaderConfig, world: World, begin: LoaderState) -> None:
        self._source, self._config, self.world = source, config, world
        self.begun_at, self.progress = begin, begin.progress
        self.num_seen = self.num_kept = 0
        self.watch = KeepRateWatch(config.threshold, config.starvation_limit)
        self._skip = begin.handed
        self._last_kept_epoch = begin.progress.epoch
        self._rebatcher = Rebatcher(config.batch_size)
        self._waiting: deque[Progress] = deque()  # before each scoring batch that has rows in the rebatcher
        self._scored = source.scored(world, lambda: LoaderState(progress=self.progress, epoch=begin.epoch))

    def next_batch(self) -> dict[str, Any] | None:
        """The next training batch, None when the epoch has no more."""
        while not self._rebatcher.is_ready:
            scored = next(self._scored, None)
            if scored is None:
                break
            self._take_in(scored)
        if not self._rebatcher.num_rows or (self._config.drop_last and not self._rebatcher.is_ready):
            return None
        batch = self._rebatcher.pop()
        while len(self._waiting) > self._rebatcher.num_pieces:
            self._waiting.popleft()
        return batch

    def _take_in(self, scored: Scored) -> None:
        threshold = self._config.threshold
        keep = passes(scored.scores, threshold) if threshold is not None else np.ones(len(scored.scores), dtype=bool)
        seen, kept = len(keep) + sum(scored.unusable.values()), int(keep.sum())
        dropped = Counter({**scored.unusable, DropReason.BELOW_THRESHOLD: len(keep) - kept})
        before = self.progress
        self.progress = before.advance(scored, FilterStats(seen=seen, kept=kept, dropped=+dropped))
        self.num_seen, self.num_kept = self.num_seen + seen, self.num_kept + kept
        self.watch.add(scored.scores, seen=seen, kept=kept)
        self._source.warn_of(scored.failures)
        if kept:
            self._last_kept_epoch = self.progress.epoch
            self._push(scored, keep, kept, before)
        elif self.progress.epoch - self._last_kept_epoch > self.world.world_size + 1:
            # Ranks take turns with the shards, so by now this one has read all of them. (One more, since the last kept
            # pair may have been early in its epoch, read by a worker that was ahead, and the next may come late.)
            raise self.watch.starved(f"{self.world.world_size + 1} whole epochs left none")

    def _push(self, scored: Scored, keep: np.ndarray, num_rows: int, before: Progress) -> None:
        rows = keep[scored.has_columns]
        columns = scored.columns if rows.all() else take(scored.columns, np.flatnonzero(rows).tolist())
        scores = {"score": torch.from_numpy(scored.scores[keep])} if self._source.has_scores else {}
        self._rebatcher.push({**columns, **scores}, num_rows)
        self._waiting.append(before)
        if self._skip:
            self._rebatcher.skip(self._skip)
            self._skip = 0

    @property
    def num_ready(self) -> int:
        """Kept pairs that were not handed out."""
        return self._rebatcher.num_rows

    def state(self, batches: int) -> LoaderState:
        """The loader's state after so many batches of the epoch."""
        waiting = self._waiting[0] if self._waiting else self.progress
        handed = self._rebatcher.num_begun if self._waiting else 0
        return LoaderState(progress=waiting, epoch=self.begun_at.epoch, handed=handed, batches=batches)

    def close(self) -> None:
        """Stop workers and thread."""
        self._scored.close()
