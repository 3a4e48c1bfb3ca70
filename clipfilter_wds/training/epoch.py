"""One iteration of a loader: reads and scores ahead, keeps and packs."""

import logging
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipfilter_wds.console import printable
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.scores.selection import passes
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.training.batches import StreamBatch
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset, StreamWorker
from clipfilter_wds.training.keep_rate import KeepRateWatch
from clipfilter_wds.training.precomputed import ScoreLookup
from clipfilter_wds.training.prefetch import Prefetcher
from clipfilter_wds.training.rebatch import Rebatcher, take
from clipfilter_wds.training.record import Recorder
from clipfilter_wds.training.scoring import Scored, score_columns, score_stream
from clipfilter_wds.training.state import LoaderState, Progress
from clipfilter_wds.types import DropReason, FilterStats
from clipfilter_wds.workers.crashes import CrashTracker, Quarantine, WorkerDiedError
from clipfilter_wds.workers.pool import worker_loader
from clipfilter_wds.world import World

if TYPE_CHECKING:
    from clipfilter_wds.models.recheck import Recheck


_log = logging.getLogger(__name__)


class Workers:
    """Gives a dataset's batches from a mark on; persistent workers go on from epoch to epoch.

    Args:
        config: The loader's.
        lookup: What workers know of a shard before they read it.
        view: How images are decoded; None for that of the dataset's ``preprocess``.
    """

    def __init__(self, config: LoaderConfig, lookup: ScoreLookup, view: ImageView | None) -> None:
        self._config, self._lookup, self._view = config, lookup, view
        self._kept: Iterable[StreamBatch] | None = None
        self._kept_for: LoaderState | None = None
        self._quarantine = Quarantine()

    def batches(self, dataset: ClipWebDataset, world: World, begin: LoaderState) -> Iterable[StreamBatch]:
        """The batches from a mark on, from the workers of the epoch before if these can give them."""
        if self._kept is not None and self._kept_for is not None and begin.is_same_place(self._kept_for):
            batches = self._kept
        else:
            batches = self._start(dataset, world, begin)
        if self._config.persistent_workers:
            # Iterated again, workers give the next epoch from its beginning, and nothing else.
            self._kept, self._kept_for = batches, LoaderState.start(len(begin.progress.positions), begin.epoch + 1)
        return batches

    def _start(self, dataset: ClipWebDataset, world: World, begin: LoaderState) -> Iterable[StreamBatch]:
        config = self._config
        tracker = CrashTracker(
            dataset.urls, config.num_workers, timeout=config.worker_timeout, left_out=self._quarantine.left_out
        )
        stream = StreamWorker(
            dataset,
            world=world,
            num_workers=max(1, config.num_workers),
            batch_size=config.score_batch_size,
            epoch=begin.epoch,
            start=begin.progress.positions,
            first=begin.progress.next_worker,
            endless=config.end == "repeat",
            lookup=self._lookup,
            view=self._view,
            tracker=tracker,
        )
        return worker_loader(
            stream,
            num_workers=config.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=config.persistent_workers,
            multiprocessing_context=config.multiprocessing_context,
            tracker=tracker,
        )

    def outlive(self, death: WorkerDiedError) -> None:
        """Note the death of a worker, after which batches can be had from where the last one ended.

        Raises:
            WorkerDiedError: When they can't, or shall not.
        """
        self._kept = None
        if self._config.on_crash == "raise":
            raise death
        self._quarantine.add(death)

    def outlived(self) -> None:
        """Note that a batch has come."""
        self._quarantine.outlived()


class Epoch:
    """One iteration: reads and scores ahead, keeps and packs."""

    def __init__(
        self,
        dataset: ClipWebDataset | Iterable[Mapping[str, Any]],
        recheck: "Recheck | None",
        config: LoaderConfig,
        world: World,
        begin: LoaderState,
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
        self._prefetcher = self._start(begin)
        self._scored = iter(self._prefetcher)

    def _start(self, begin: LoaderState) -> Prefetcher[Any, Scored]:
        if not isinstance(self._dataset, ClipWebDataset):
            return Prefetcher(self._dataset, partial(score_columns, self._recheck))
        batches = self._workers.batches(self._dataset, self.world, begin)
        score = partial(score_stream, self._recheck, self._recorder)
        return Prefetcher(batches, score, keep=self._config.persistent_workers)

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
                self._prefetcher.close()
                self._workers.outlive(death)
                # All batches before the death were taken in, so this goes on exactly behind them.
                self._prefetcher = self._start(LoaderState(progress=self.progress, epoch=self.begun_at.epoch))
                self._scored = iter(self._prefetcher)
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

    def mark(self, batches: int) -> LoaderState:
        """Where this run is, after so many batches of the epoch."""
        waiting = self._waiting[0] if self._waiting else self.progress
        handed = self._rebatcher.num_begun if self._waiting else 0
        return LoaderState(progress=waiting, epoch=self.begun_at.epoch, handed=handed, batches=batches)

    def flush_record(self) -> None:
        """Write the scores that are not yet recorded."""
        if self._recorder is not None:
            self._recorder.flush()

    def close(self) -> None:
        """Stop workers and thread."""
        self._prefetcher.close()
        self.flush_record()
