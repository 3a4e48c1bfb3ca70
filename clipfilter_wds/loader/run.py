"""One iteration of a loader: reads and scores ahead, keeps and packs."""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipfilter_wds.dataset import ClipWebDataset
from clipfilter_wds.feed import Feed
from clipfilter_wds.loader.config import LoaderConfig
from clipfilter_wds.loader.mark import Mark, Progress
from clipfilter_wds.loader.record import Recorder
from clipfilter_wds.loader.scored import Scored, score_columns, score_stream
from clipfilter_wds.loader.workers import Workers
from clipfilter_wds.rebatch import Rebatcher, take
from clipfilter_wds.selection import passes
from clipfilter_wds.shards import public_url
from clipfilter_wds.terminal import printable
from clipfilter_wds.types import DropReason, FilterStats
from clipfilter_wds.watch import KeepRateWatch
from clipfilter_wds.whereabouts import WorkerDiedError
from clipfilter_wds.world import World

if TYPE_CHECKING:  # importing models takes seconds, and a loader that takes its scores from a table has none
    from clipfilter_wds.recheck import Recheck

_log = logging.getLogger(__name__)


class Run:
    """One iteration: reads and scores ahead, keeps and packs."""

    def __init__(
        self,
        dataset: ClipWebDataset | Iterable[Mapping[str, Any]],
        recheck: "Recheck | None",
        config: LoaderConfig,
        world: World,
        begin: Mark,
        workers: Workers,
        recorder: Recorder | None,
        reported: set[str],
        *,
        has_scores: bool,
    ) -> None:
        self.world = world
        self._dataset, self._recheck, self._workers = dataset, recheck, workers
        self._config, self._recorder, self._reported = config, recorder, reported
        self.begun_at = begin
        self.progress = begin.progress
        self.num_seen = self.num_kept = 0
        self._skip = begin.handed
        self._has_scores = has_scores
        self._last_kept_epoch = begin.progress.epoch
        self._rebatcher = Rebatcher(config.batch_size)
        self._waiting: deque[Progress] = deque()
        self.watch = KeepRateWatch(config.threshold, config.starvation_limit)
        self._feed = self._start(begin)
        self._scored = iter(self._feed)

    def _start(self, begin: Mark) -> Feed[Any, Scored]:
        if not isinstance(self._dataset, ClipWebDataset):
            return Feed(self._dataset, partial(score_columns, self._recheck))
        batches = self._workers.batches(self._dataset, self.world, begin)
        score = partial(score_stream, self._recheck, self._recorder)
        return Feed(batches, score, keep=self._config.persistent_workers)

    def next_batch(self) -> dict[str, Any] | None:
        """The next training batch, None when the epoch has no more."""
        while not self._rebatcher.is_ready:
            scored = self._next_scored()
            if scored is None:
                break
            self._take_in(scored)
        if not self._rebatcher.num_rows or (self._config.drop_last and not self._rebatcher.is_ready):
            return None
        batch = self._rebatcher.pop()
        while len(self._waiting) > self._rebatcher.num_pieces:
            self._waiting.popleft()
        return batch

    def _next_scored(self) -> Scored | None:
        while True:
            try:
                scored = next(self._scored, None)
            except WorkerDiedError as death:
                self._feed.close()
                self._workers.outlive(death)
                # All batches before the death were taken in, so this goes on exactly behind them.
                self._feed = self._start(Mark(progress=self.progress, epoch=self.begun_at.epoch))
                self._scored = iter(self._feed)
            else:
                self._workers.outlived()
                return scored

    def _take_in(self, scored: Scored) -> None:
        threshold = self._config.threshold
        keep = passes(scored.scores, threshold) if threshold is not None else np.ones(len(scored.scores), dtype=bool)
        seen, kept = len(keep) + sum(scored.unusable.values()), int(keep.sum())
        dropped = Counter({**scored.unusable, DropReason.BELOW_THRESHOLD: len(keep) - kept})
        before = self.progress
        self.progress = before.advance(scored, FilterStats(seen=seen, kept=kept, dropped=+dropped))
        self.num_seen, self.num_kept = self.num_seen + seen, self.num_kept + kept
        self.watch.add(scored.scores, seen=seen, kept=kept)
        for url, why in scored.failures:
            if url not in self._reported:
                self._reported.add(url)
                _log.warning("a shard is left out: %s: %s", printable(public_url(url)), printable(why))
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
        scores = {"score": torch.from_numpy(scored.scores[keep])} if self._has_scores else {}
        self._rebatcher.push({**columns, **scores}, num_rows)
        self._waiting.append(before)
        if self._skip:
            self._rebatcher.skip(self._skip)
            self._skip = 0

    @property
    def num_ready(self) -> int:
        """Kept pairs that were not handed out."""
        return self._rebatcher.num_rows

    def mark(self, batches: int) -> Mark:
        """Where this run is, after so many batches of the epoch."""
        waiting = self._waiting[0] if self._waiting else self.progress
        handed = self._rebatcher.num_begun if self._waiting else 0
        return Mark(progress=waiting, epoch=self.begun_at.epoch, handed=handed, batches=batches)

    def flush_record(self) -> None:
        """Write the scores that are not yet recorded."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self) -> None:
        """Stop workers and thread."""
        self._feed.close()
        self.flush_record()
