"""Gives a loader's scored batches: read and decoded in workers, scored ahead in a thread."""

import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from clipfilter_wds.console import printable
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.training.batches import StreamBatch
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset, StreamWorker
from clipfilter_wds.training.precomputed import ScoreLookup, no_scores
from clipfilter_wds.training.prefetch import Prefetcher
from clipfilter_wds.training.record import Recorder
from clipfilter_wds.training.scoring import Scored, score_columns, score_stream
from clipfilter_wds.training.state import LoaderState
from clipfilter_wds.workers.crashes import CrashTracker, Quarantine, WorkerDiedError
from clipfilter_wds.workers.pool import iterating, worker_loader
from clipfilter_wds.workers.restart import restarting
from clipfilter_wds.world import World

if TYPE_CHECKING:
    from clipfilter_wds.models.recheck import Recheck
    from clipfilter_wds.models.scorer import ClipScorer

_log = logging.getLogger(__name__)


class BatchSource:
    """Gives a loader's scored batches, epoch by epoch; persistent workers and what killed workers stay with it.

    Args:
        dataset: The loader's.
        config: The loader's.
        scorer: The model; None where there is none.
        lookup: What workers know of a shard before they read it.
        view: How images are decoded; None for that of the dataset's ``preprocess``.
        recorder: Records the scores that are made.
    """

    def __init__(
        self,
        dataset: ClipWebDataset | Iterable[Mapping[str, Any]],
        config: LoaderConfig,
        scorer: "ClipScorer | None",
        *,
        lookup: ScoreLookup = no_scores,
        view: ImageView | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._dataset, self._config, self._scorer = dataset, config, scorer
        self._lookup, self._view, self._recorder = lookup, view, recorder
        self.has_scores = scorer is not None or lookup is not no_scores
        self._quarantine = Quarantine(0) if config.on_crash == "raise" else Quarantine()
        self._persistent: tuple[LoaderState, Iterable[StreamBatch]] | None = None
        self._reported: set[str] = set()  # bad shards that were warned of

    def scored(self, world: World, where: Callable[[], LoaderState]) -> Generator[Scored]:
        """Scored batches of one epoch, made ahead in workers and a thread, which end when this generator is closed.

        Args:
            world: This rank among all.
            where: Tells where to start; asked again after the death of a worker: behind the batches that have come.

        Raises:
            WorkerDiedError: When a worker dies that is not to be replaced.
        """
        recheck = self._new_recheck()
        if not isinstance(self._dataset, ClipWebDataset):
            with iterating(Prefetcher(self._dataset, partial(score_columns, recheck))) as batches:
                yield from batches
            return
        dataset, config = self._dataset, self._config
        score = partial(score_stream, recheck, self._recorder)

        def start(tracker: CrashTracker) -> Prefetcher[StreamBatch, Scored]:
            batches = self._batches(dataset, world, where(), tracker)
            return Prefetcher(batches, score, keep=config.persistent_workers)

        try:
            yield from restarting(
                start,
                dataset.urls,
                num_workers=config.num_workers,
                worker_timeout=config.worker_timeout,
                quarantine=self._quarantine,
            )
        except WorkerDiedError:
            self._persistent = None
            raise
        finally:
            self.flush_record()

    def flush_record(self) -> None:
        """Write the scores that are not yet recorded."""
        if self._recorder is not None:
            self._recorder.flush()

    def _new_recheck(self) -> "Recheck | None":
        if self._scorer is None:
            return None
        from clipfilter_wds.models.recheck import Recheck

        return Recheck(self._scorer, self._config.threshold)

    def _batches(
        self, dataset: ClipWebDataset, world: World, begin: LoaderState, tracker: CrashTracker
    ) -> Iterable[StreamBatch]:
        """Unscored batches, from persistent workers if they continue there, else from new ones."""
        config = self._config
        if self._persistent is not None and begin.is_same_place(self._persistent[0]):
            batches = self._persistent[1]
        else:
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
            batches = worker_loader(
                stream,
                num_workers=config.num_workers,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=config.persistent_workers,
                multiprocessing_context=config.multiprocessing_context,
                tracker=tracker,
            )
        if config.persistent_workers:
            # Iterated again, workers give the next epoch from its beginning, and nothing else.
            self._persistent = LoaderState.start(len(begin.progress.positions), begin.epoch + 1), batches
        return batches

    def warn_of(self, failures: Iterable[tuple[str, str]]) -> None:
        """Say once of each shard that can't be used why that is."""
        for url, why in failures:
            if url not in self._reported:
                self._reported.add(url)
                _log.warning("a shard is left out: %s: %s", printable(public_url(url)), printable(why))
