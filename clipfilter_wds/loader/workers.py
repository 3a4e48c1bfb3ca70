"""The processes that read and decode for a loader."""

from collections.abc import Iterable

import torch

from clipfilter_wds.dataset import ClipWebDataset, StreamBatch, StreamWorker
from clipfilter_wds.loader.config import LoaderConfig
from clipfilter_wds.loader.mark import Mark
from clipfilter_wds.preprocess import ImageView
from clipfilter_wds.processes import worker_loader
from clipfilter_wds.stream import LookUp
from clipfilter_wds.whereabouts import Deaths, Whereabouts, WorkerDiedError
from clipfilter_wds.world import World


class Workers:
    """Gives a dataset's batches from a mark on; persistent workers go on from epoch to epoch.

    Args:
        config: The loader's.
        look_up: What workers know of a shard before they read it.
        view: How images are decoded; None for that of the dataset's ``preprocess``.
    """

    def __init__(self, config: LoaderConfig, look_up: LookUp, view: ImageView | None) -> None:
        self._config, self._look_up, self._view = config, look_up, view
        self._kept: Iterable[StreamBatch] | None = None
        self._kept_for: Mark | None = None
        self._deaths = Deaths()

    def batches(self, dataset: ClipWebDataset, world: World, begin: Mark) -> Iterable[StreamBatch]:
        """The batches from a mark on, from the workers of the epoch before if these can give them."""
        if self._kept is not None and self._kept_for is not None and begin.is_same_place(self._kept_for):
            batches = self._kept
        else:
            batches = self._start(dataset, world, begin)
        if self._config.persistent_workers:
            # Iterated again, workers give the next epoch from its beginning, and nothing else.
            self._kept, self._kept_for = batches, Mark.start(len(begin.progress.positions), begin.epoch + 1)
        return batches

    def _start(self, dataset: ClipWebDataset, world: World, begin: Mark) -> Iterable[StreamBatch]:
        config = self._config
        whereabouts = Whereabouts(
            dataset.urls, config.num_workers, timeout=config.worker_timeout, left_out=self._deaths.left_out
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
            look_up=self._look_up,
            view=self._view,
            whereabouts=whereabouts,
        )
        return worker_loader(
            stream,
            num_workers=config.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=config.persistent_workers,
            multiprocessing_context=config.multiprocessing_context,
            whereabouts=whereabouts,
        )

    def outlive(self, death: WorkerDiedError) -> None:
        """Note the death of a worker, after which batches can be had from where the last one ended.

        Raises:
            WorkerDiedError: When they can't, or shall not.
        """
        self._kept = None
        if self._config.on_crash == "raise":
            raise death
        self._deaths.add(death)

    def outlived(self) -> None:
        """Note that a batch has come."""
        self._deaths.outlived()
