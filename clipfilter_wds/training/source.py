"""Gives a loader's training batches: read and decoded in workers, scored and packed ahead in a thread."""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from clipfilter_wds.console import printable
from clipfilter_wds.preprocess.image import ImageView
from clipfilter_wds.scores.kind import COSINES, ScoreKind
from clipfilter_wds.scores.metadata import DTYPES
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.columns import score_columns
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset, StreamWorker
from clipfilter_wds.training.packer import Packed, Packer
from clipfilter_wds.training.precomputed import ScoreLookup, no_scores
from clipfilter_wds.training.prefetch import Prefetcher
from clipfilter_wds.training.record import Recorder
from clipfilter_wds.training.scoring import Scored, score_stream
from clipfilter_wds.training.state import LoaderState, Progress
from clipfilter_wds.workers.crashes import CrashTracker, Quarantine, WorkerDiedError
from clipfilter_wds.workers.pool import WorkerLoader, iterating, worker_loader
from clipfilter_wds.workers.restart import restarting

if TYPE_CHECKING:
    from clipfilter_wds.models.recheck import Recheck
    from clipfilter_wds.models.scorer import ClipScorer

_log = logging.getLogger(__name__)


#: Samples that are read together where there is no model.
_BATCH_SIZE = 64


class BatchSource:
    """Gives a loader's training batches, epoch by epoch; persistent workers and what killed workers stay with it.

    Args:
        dataset: The loader's.
        config: The loader's.
        scorer: The model; None where there is none.
        lookup: What workers know of a shard before they read it.
        view: How images are decoded; None for that of the dataset's ``preprocess``.
        recorder: Records the scores that are made.
        kind: Of the scores.
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
        kind: ScoreKind = COSINES,
    ) -> None:
        self._dataset, self._config, self._scorer = dataset, config, scorer
        self._lookup, self._view, self._recorder, self.kind = lookup, view, recorder, kind
        #: Samples that are scored together.
        self.score_batch_size = config.score_batch_size or _score_batch_size(scorer)
        self.layout = dataset.layout if isinstance(dataset, ClipWebDataset) else SampleLayout()
        self.has_scores = scorer is not None or lookup is not no_scores
        #: Whether batches stay in the workers' memory until the model has a copy of them.
        self._lends = scorer is not None and scorer.copies_inputs
        self._quarantine = Quarantine(0) if config.on_crash == "raise" else Quarantine()
        self._persistent: _Persistent | None = None
        self._reported: set[str] = set()  # bad shards that were warned of

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_persistent": None}  # processes can't be copied

    def packed(self, packer: Packer) -> Generator[Packed]:
        """Training batches of one epoch, made ahead in workers and a thread, which end when this generator is closed.

        After the death of a worker it continues behind the batches that have come.

        Args:
            packer: Makes them of scored batches.

        Raises:
            WorkerDiedError: When a worker dies that is not to be replaced.
        """
        recheck = self._new_recheck()
        if not isinstance(self._dataset, ClipWebDataset):
            with iterating(
                Prefetcher(self._dataset, partial(self._pack, packer, partial(score_columns, recheck)))
            ) as it:
                yield from it
            return
        dataset, config = self._dataset, self._config
        pack = partial(self._pack, packer, partial(score_stream, recheck, self._recorder))

        if self._scorer is not None:
            self._scorer.warm_up(self.score_batch_size)  # here, in the main thread

        batches: Any = None

        def start(tracker: CrashTracker) -> Prefetcher[Any, Packed]:
            nonlocal batches
            if self._keeps(batches):
                self._persistent = None  # one of these workers has died
            batches = self._batches(dataset, packer.place, tracker)
            return Prefetcher(batches, pack, keep=self._keeps(batches))

        try:
            yield from restarting(
                start,
                dataset.urls,
                num_workers=config.num_workers,
                worker_timeout=config.worker_timeout,
                quarantine=self._quarantine,
            )
        except WorkerDiedError:
            if self._keeps(batches):
                self._persistent = None
            raise
        finally:
            if self._persistent is not None and self._keeps(batches):
                self._persistent.is_in_use = False
            self.flush_record()

    def _keeps(self, batches: Any) -> bool:
        """Whether these are the persistent workers."""
        return self._persistent is not None and self._persistent.workers is batches

    def _pack(
        self, packer: Packer, score: Callable[[Iterable[Any]], Iterator[Scored]], batches: Iterable[Any]
    ) -> Iterator[Packed]:
        """All that is done in the thread."""

        def scored() -> Iterator[Scored]:
            for batch in score(batches):
                self._quarantine.note_batch()
                self._warn_of(batch.failures)
                yield batch

        return packer.pack(scored())

    def close(self) -> None:
        """End persistent workers."""
        if self._persistent is not None:
            self._persistent.workers.close()
            self._persistent = None

    def flush_record(self) -> None:
        """Write the scores that are not yet recorded."""
        if self._recorder is not None:
            self._recorder.flush()

    def _new_recheck(self) -> "Recheck | None":
        if self._scorer is None:
            return None
        from clipfilter_wds.models.recheck import Recheck

        saved = self._config.record_embeddings
        dtype = None if saved is None else getattr(torch, DTYPES[saved])
        return Recheck(self._scorer, self._config.resolved_threshold, embeddings=dtype)

    def _batches(self, dataset: ClipWebDataset, begin: LoaderState, tracker: CrashTracker) -> Iterable[Any]:
        """Unscored batches, from persistent workers if they continue there, else from new ones.

        New ones end with the iteration where another one, which is not over, has the persistent workers.
        """
        config, progress, persistent = self._config, begin.progress, self._persistent
        is_free = persistent is None or not persistent.is_in_use
        if persistent is not None and is_free and progress.is_same_place(persistent.next):
            batches: Iterable[Any] = persistent.workers
        else:
            stream = StreamWorker(
                dataset,
                progress.topology,
                progress.streams,
                batch_size=self.score_batch_size,
                epoch=begin.epoch,
                first=progress.next_worker,
                endless=config.end == "repeat",
                lookup=self._lookup,
                view=self._view,
                interleaved=self._lends,
                tracker=tracker,
            )
            batches = worker_loader(
                stream,
                num_workers=config.num_workers,
                lend=self._lends,
                batch_bytes=stream.settings.batch_bytes,
                persistent_workers=config.persistent_workers and is_free,
                multiprocessing_context=config.multiprocessing_context,
                tracker=tracker,
            )
        if isinstance(batches, WorkerLoader) and config.persistent_workers and is_free:
            # Iterated again, workers give the next epoch from its beginning, and nothing else.
            self._persistent = _Persistent(next=Progress.start(progress.topology, begin.epoch + 1), workers=batches)
        return batches

    def _warn_of(self, failures: Iterable[tuple[str, str]]) -> None:
        """Say once of each shard that can't be used why that is."""
        for url, why in failures:
            if url not in self._reported:
                self._reported.add(url)
                _log.warning("a shard is left out: %s: %s", printable(public_url(url)), printable(why))


@dataclass
class _Persistent:
    """Workers that stay, where they continue, and whether an iteration that is not over has them."""

    next: Progress
    workers: WorkerLoader
    is_in_use: bool = True


def _score_batch_size(scorer: "ClipScorer | None") -> int:
    if scorer is None:
        return _BATCH_SIZE
    from clipfilter_wds.models.batch_size import default_batch_size

    return default_batch_size(scorer.device, scorer.fast.width)
