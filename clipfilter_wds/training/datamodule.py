"""Runs the loader under Lightning: a data module that filters while it streams, and resumes from checkpoints."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from torch import distributed

from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.world import World

Config = TypeVar("Config", ScorerConfig, LoaderConfig)


class ClipFilterDataModule(L.LightningDataModule):
    """Streams image-caption shards into training and drops mispaired samples on the way.

    Batches are those of ``ClipFilterLoader``. Checkpoints hold the exact position on every rank:
    ``trainer.fit(..., ckpt_path=...)`` resumes with the batch after the one that was trained last.

    Args:
        train: Shards to train on: a path, glob, brace range, ``@file.txt`` or a list of these.
        val: Shards to validate on, if any. They are not shuffled.
        scores: Folder of score tables of all these shards, from ``clipfilter-wds score`` or ``rewrite`` or an earlier
            ``loader.record``. Their scores decide then, and no model is loaded.
        filter_train: Whether to filter training samples.
        filter_val: Whether to filter validation samples.
        image_transform: RGB image -> training view; ``null`` gives CLIP's own view, uint8 ``[3, H, W]``.
        text_transform: Caption -> training view; ``null`` gives the caption.
        columns: Extensions of other members that batches get as columns (``[json, cls]``); see ``ClipWebDataset``.
        sample_transform: Other members of a sample, by extension -> columns.
        caption: Extension of the member that holds the caption (``txt``), or a field of the json member
            (``json:caption``).
        image: Extension of the member that holds the image, or several, best first; ``null`` for the usual ones.
        shuffle: Shuffle shards, and samples within windows of this many; 0 keeps the order.
        seed: Of the order.
        scorer: The CLIP that filters. Its device ``auto`` is the rank's own.
        loader: How training batches are made. Validation batches are made alike, but for what concerns the end of an
            epoch, and are not recorded.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        *,
        scores: str | None = None,
        filter_train: bool = True,
        filter_val: bool = False,
        image_transform: Callable[[Any], Any] | None = None,
        text_transform: Callable[[str], Any] | None = None,
        columns: list[str] | None = None,
        sample_transform: Callable[[dict[str, Any]], Any] | None = None,
        caption: str = "txt",
        image: str | None = None,
        shuffle: int = 1000,
        seed: int = 0,
        scorer: ScorerConfig = ScorerConfig(),
        loader: LoaderConfig = LoaderConfig(),
    ) -> None:
        super().__init__()
        self._scorer_config, self._loader_config = _config(ScorerConfig, scorer), _config(LoaderConfig, loader)
        self.save_hyperparameters(ignore=["image_transform", "text_transform", "sample_transform", "scorer", "loader"])
        self.save_hyperparameters({"scorer": _plain(self._scorer_config), "loader": _plain(self._loader_config)})
        self._image_transform, self._text_transform = image_transform, text_transform
        self._sample_transform = sample_transform
        self._scorer: ClipScorer | ScoreFolder | None = None
        self._epoch_loader: _EpochLoader | None = None
        self._resumed: Mapping[str, Any] | None = None
        #: The training loader, once there is one.
        self.train_loader: ClipFilterLoader | None = None

    def setup(self, stage: str) -> None:
        """Load the filter's model to this rank's device, or find its score tables."""
        if self._scorer is not None:
            return
        if self.hparams["scores"] is not None:
            self._scorer = ScoreFolder(self.hparams["scores"])
            return
        config = self._scorer_config
        if config.device == "auto":
            config = replace(config, device=str(self._trainer.strategy.root_device))
        self._scorer = ClipScorer(**asdict(config))

    def train_dataloader(self) -> "_EpochLoader":
        """Batches to train on."""
        config, filtered = self._loader_config, self.hparams["filter_train"]
        if not filtered:
            config = replace(config, threshold=None, record=None)
        self.train_loader = self._loader(self.hparams["train"], config, filtered, self.hparams["shuffle"])
        self._epoch_loader = _EpochLoader(self.train_loader, self._trainer, self._resumed)
        self._resumed = None
        return self._epoch_loader

    def teardown(self, stage: str) -> None:
        """End what training leaves running."""
        if stage == "fit" and self.train_loader is not None:
            self.train_loader.close()

    def state_dict(self) -> dict[str, Any]:
        """The position of every rank's training stream."""
        return {} if self._epoch_loader is None else self._epoch_loader.position()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: When the checkpoint was written by another number of ranks.
        """
        if not state_dict:
            return
        num_ranks = len(state_dict["ranks"])
        if num_ranks != self._trainer.world_size:
            raise ValueError(
                f"the checkpoint was written by {num_ranks} ranks and is read by {self._trainer.world_size}"
            )
        self._resumed = state_dict

    def val_dataloader(self) -> Any:
        """Batches to validate on; none without ``val``."""
        if self.hparams["val"] is None:
            return []
        config, filtered = self._loader_config, self.hparams["filter_val"]
        config = replace(
            config,
            threshold=config.threshold if filtered else None,
            record=None,
            drop_last=False,
            end="sync",
            batches_per_epoch=None,
            persistent_workers=False,  # they would be about to give the second epoch
        )
        return _SameEveryTime(self._loader(self.hparams["val"], config, filtered, shuffle=0))

    def _loader(self, shards: str | list[str], config: LoaderConfig, filtered: bool, shuffle: int) -> ClipFilterLoader:
        trainer, scorer = self._trainer, self._scorer
        if scorer is None:
            raise RuntimeError("the data module has no model yet; its setup() comes first")
        dataset = ClipWebDataset(
            shards,
            None if isinstance(scorer, ScoreFolder) else scorer.preprocess,
            image_transform=self._image_transform,
            text_transform=self._text_transform,
            columns=self.hparams["columns"],
            sample_transform=self._sample_transform,
            shuffle=shuffle,
            seed=self.hparams["seed"],
            layout=SampleLayout(caption=self.hparams["caption"], image=self.hparams["image"]),
            world=World(rank=trainer.global_rank, world_size=trainer.world_size),
        )
        return ClipFilterLoader(
            dataset, scorer if filtered or isinstance(scorer, ScoreFolder) else None, **asdict(config)
        )

    @property
    def _trainer(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("ClipFilterDataModule works with a Trainer; without one, use ClipFilterLoader")
        return self.trainer


def _config(kind: type[Config], given: Config | Mapping[str, Any]) -> Config:
    """A config; made here where a checkpoint's hyperparameters are given."""
    return kind(**given) if isinstance(given, Mapping) else given


def _plain(config: ScorerConfig | LoaderConfig) -> dict[str, Any]:
    """A config as plain values, so that a checkpoint loads with ``weights_only``."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


class _EpochLoader:
    """The training loader as the fit loop iterates it.

    The fit loop may make two iterators for one epoch, so an epoch begins where it began before. And it counts an epoch
    that ``max_steps`` or ``should_stop`` cut off; a resumed run gives the rest of that epoch as its next one, so
    the loader counts its own.
    """

    def __init__(self, loader: ClipFilterLoader, trainer: L.Trainer, resumed: Mapping[str, Any] | None) -> None:
        self._loader, self._trainer, self._resumed = loader, trainer, resumed
        self._epoch = self._counted = -1  # the loader's, and how many the fit loop had counted when it began
        self._begin: Mapping[str, Any] = {}
        self._num_before = 0  # batches that were trained before the loader's epoch
        if resumed is not None:
            loader.load_state_dict(resumed["ranks"][trainer.global_rank])

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Not trainer.current_epoch, which lags behind when a run resumes at the end of an epoch.
        counted: int = self._fit_loop.epoch_progress.current.processed
        if counted != self._counted:
            self._start_epoch(counted)
        self._loader.load_state_dict(self._begin)
        return iter(self._loader)

    def _start_epoch(self, counted: int) -> None:
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            self._epoch = counted if self._epoch < 0 else self._epoch + counted - self._counted
            self._loader.set_epoch(self._epoch)
        else:
            self._epoch = resumed["epoch"]
            if not resumed["within_epoch"]:
                self._loader.set_epoch(self._epoch)
        self._counted, self._begin = counted, self._loader.state_dict()
        self._num_before = self._num_trained - self._begin["batches"]

    def position(self) -> dict[str, Any]:
        """Where all ranks are, after the batch that was trained last."""
        epoch_loop = self._fit_loop.epoch_loop
        # The fit loop fetches one batch ahead of the one that it trains on.
        mine = self._loader.state_dict(after=self._num_trained - self._num_before)
        # Only rank zero's checkpoint is written, so it holds the states of all.
        ranks: list[Any] = [mine]
        if self._trainer.world_size > 1:
            ranks = [None] * self._trainer.world_size
            distributed.all_gather_object(ranks, mine)
        within_epoch = self._fit_loop.epoch_progress.current.processed == self._counted
        is_through = (
            epoch_loop.batch_progress.is_last_batch
            or epoch_loop.batch_progress.current.ready == self._trainer.num_training_batches  # may be limited
        )
        return {
            "epoch": self._epoch + (is_through and not within_epoch),
            "within_epoch": within_epoch,
            "ranks": ranks,
        }

    @property
    def _num_trained(self) -> int:
        """Batches since training began; those of the epoch may or may not start from 0 in a resumed run."""
        num_trained: int = self._fit_loop.epoch_loop.batch_progress.total.processed
        return num_trained

    @property
    def _fit_loop(self) -> Any:  # whose progress Lightning types too widely
        return self._trainer.fit_loop

    def state_dict(self) -> dict[str, Any]:
        """Tells Lightning that the loader can be resumed; the data module holds the state.

        Lightning restores a loader's own state when it stopped within an epoch, but not at the end of one.
        """
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Called when Lightning resumes within an epoch."""
        # Saved with an epoch's last batch and of unknown length, the flag would end every later epoch before it begins.
        self._trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = False


class _SameEveryTime:
    """A loader that begins at its first epoch whenever it is iterated, as validation should."""

    def __init__(self, loader: ClipFilterLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._loader.set_epoch(0)
        return iter(self._loader)
