"""Runs the loader under Lightning: a data module that filters while it streams, and resumes from checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.options import check_options, plain
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.config import EvalEnd, LoaderConfig
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.fit_loader import FitLoader
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.world import World

Config = TypeVar("Config", ScorerConfig, LoaderConfig)
EvalStage = Literal["val", "test", "predict"]


class ClipFilterDataModule(L.LightningDataModule):
    """Streams image-caption shards into training and drops mispaired samples on the way.

    Batches are those of ``ClipFilterLoader``. Checkpoints hold the exact position on every rank:
    ``trainer.fit(..., ckpt_path=...)`` resumes with the batch after the one that was trained last or, on another number
    of ranks, with what was not given yet. Validation, test and prediction read every sample once, on any number of
    ranks, unshuffled and from the beginning.

    Args:
        train: Shards to train on: a path, glob, brace range, ``@file.txt`` or a list of these.
        val: Shards to validate on, if any.
        test: Shards to test on, if any.
        predict: Shards to predict on, if any.
        scores: Folder of score tables of all these shards, from ``clipfilter-wds score`` or ``rewrite`` or an earlier
            ``loader.record``. Their scores decide then, and no model is loaded.
        filter_train: Whether to filter training samples.
        filter_val: Whether to filter validation samples.
        filter_test: Whether to filter test samples.
        filter_predict: Whether to filter samples to predict on.
        score_unfiltered: Whether to score what is not filtered, too, so that every batch has a ``score``. It always has
            one with ``scores``.
        val_end: How validation, test and prediction end on several ranks that have unequal numbers of batches.
            ``each``: each rank by itself. ``pad``: all ranks get as many batches, all of ``batch_size``, for FSDP and
            for steps in which ranks meet; a bool column ``is_padding`` marks the rows that are repeated for that.
        image_transform: RGB image -> training view; ``null`` gives CLIP's own view, uint8 ``[3, H, W]``.
        text_transform: Caption -> training view; ``null`` gives the caption.
        columns: Extensions of other members that batches get as columns (``[json, cls]``); see ``ClipWebDataset``.
        sample_transform: Other members of a sample, by extension -> columns.
        caption: Extension of the member that holds the caption (``txt``), or a field of the json member
            (``json:caption``). Several, a list or separated by commas, are several captions of the same image.
        image: Extension of the member that holds the image, or several, a list or separated by commas, best first;
            ``null`` for the usual ones.
        skip_missing_shards: Leave out shards that are named and not there, such as those that a brace range spans, with
            a warning. Without it, they are an error.
        shuffle: Shuffle training shards, and samples within windows of this many; 0 keeps the order.
        seed: Of the order.
        scorer: The CLIP that filters. Its device ``auto`` is the rank's own.
        loader: How training batches are made. The others are made alike, but for what concerns the end of an epoch, and
            are not recorded.

    Raises:
        ValueError: When an option can't be used.
        TypeError: When ``scorer`` or ``loader`` holds no options, or one that there is not.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        *,
        scores: str | None = None,
        filter_train: bool = True,
        filter_val: bool = False,
        filter_test: bool = False,
        filter_predict: bool = False,
        score_unfiltered: bool = True,
        val_end: EvalEnd = "each",
        image_transform: Callable[[Any], Any] | None = None,
        text_transform: Callable[[str], Any] | None = None,
        columns: list[str] | None = None,
        sample_transform: Callable[[dict[str, Any]], Any] | None = None,
        caption: str | list[str] = "txt",
        image: str | list[str] | None = None,
        skip_missing_shards: bool = False,
        shuffle: int = 1000,
        seed: int = 0,
        scorer: ScorerConfig = ScorerConfig(),
        loader: LoaderConfig = LoaderConfig(),
    ) -> None:
        super().__init__()
        # Plain values, so that a checkpoint loads with ``weights_only``.
        train, val, test, predict, scores = map(_as_texts, (train, val, test, predict, scores))
        shuffle, seed = plain(shuffle), plain(seed)
        self._scorer_config, self._loader_config = (
            _config("scorer", ScorerConfig, scorer),
            _config("loader", LoaderConfig, loader),
        )
        if self._loader_config.is_evaluation:
            raise ValueError(f"loader.end is {self._loader_config.end!r}, which is for evaluation; give it as val_end")
        if val_end not in get_args(EvalEnd):
            raise ValueError(f"val_end is {val_end!r}; use 'each' or 'pad'")
        self.save_hyperparameters(ignore=["image_transform", "text_transform", "sample_transform", "scorer", "loader"])
        self.save_hyperparameters({"scorer": _plain(self._scorer_config), "loader": _plain(self._loader_config)})
        self._image_transform, self._text_transform = image_transform, text_transform
        self._sample_transform = sample_transform
        self._scorer: ClipScorer | ScoreFolder | None = None
        self._loaded_config: ScorerConfig | None = None
        self._fit_loader: FitLoader | None = None
        self._resumed: Mapping[str, Any] | None = None
        #: The training loader, once there is one.
        self.train_loader: ClipFilterLoader | None = None
        if val is None:
            # To Lightning it is then not defined, so that fitting does not validate, and does not warn of it.
            self.val_dataloader = None  # type: ignore[assignment, method-assign]

    def setup(self, stage: str) -> None:
        """Load the filter's model to this rank's device, or find its score tables.

        Raises:
            ValueError: When there are no shards to validate on, and ``stage`` is to.
        """
        if stage == "fit":
            self._fit_loader = self._resumed = None
        if stage == "validate":
            self._eval_shards("val")
        config = self._scorer_config
        if self.trainer is not None and config.device == "auto":
            config = replace(config, device=str(self.trainer.strategy.root_device))
        if self.hparams["scores"] is not None:
            self._scorer = self._scorer or ScoreFolder(self.hparams["scores"])
        elif config != self._loaded_config:
            self._scorer, self._loaded_config = ClipScorer(**asdict(config)), config

    def train_dataloader(self) -> FitLoader | ClipFilterLoader:
        """Batches to train on. While a Trainer fits, they are the rest of its stream, however often it asks."""
        trainer = self.trainer if self._is_fitting else None
        if trainer is None:
            return self._train_loader(self._loader_config, self.hparams["shuffle"])
        if self._fit_loader is None:
            config, shuffle = self._loader_config, self.hparams["shuffle"]
            if trainer.overfit_batches:  # type: ignore[attr-defined]  # set by a connector
                shuffle = 0
                config = replace(config, end="sync", batches_per_epoch=None, persistent_workers=False)
            # A Trainer that fits once more, for more epochs, does not begin an endless stream in the same order again.
            self.train_loader = self._train_loader(config, shuffle, epoch=trainer.current_epoch)
            self._fit_loader = FitLoader(self.train_loader, trainer, self._resumed)
        return self._fit_loader

    def val_dataloader(self) -> ClipFilterLoader:
        """Batches to validate on."""
        return self._eval_loader("val")

    def test_dataloader(self) -> ClipFilterLoader:
        """Batches to test on.

        Raises:
            ValueError: When there are no shards for it.
        """
        return self._eval_loader("test")

    def predict_dataloader(self) -> ClipFilterLoader:
        """Batches to predict on.

        Raises:
            ValueError: When there are no shards for it.
        """
        return self._eval_loader("predict")

    def teardown(self, stage: str) -> None:
        """End what training leaves running."""
        if stage == "fit" and self.train_loader is not None:
            self.train_loader.close()

    def state_dict(self) -> dict[str, Any]:
        """The position of every rank's training stream; empty before there is one."""
        return {} if self._fit_loader is None else self._fit_loader.position()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume there, if a Trainer is about to fit. What only evaluates begins at the beginning."""
        if self._is_fitting:
            self._resumed = state_dict

    @property
    def _is_fitting(self) -> bool:
        state = self.trainer.state if self.trainer is not None else None
        return state is not None and (state.fn, state.status) == (TrainerFn.FITTING, TrainerStatus.RUNNING)

    def _train_loader(self, config: LoaderConfig, shuffle: int, epoch: int = 0) -> ClipFilterLoader:
        is_filtered = self.hparams["filter_train"]
        return self._loader(self.hparams["train"], config, is_filtered=is_filtered, shuffle=shuffle, epoch=epoch)

    def _eval_shards(self, stage: EvalStage) -> str | list[str]:
        shards: str | list[str] | None = self.hparams[stage]
        if shards is None:
            raise ValueError(f"the data module has no shards for this; give it some: ClipFilterDataModule({stage}=...)")
        return shards

    def _eval_loader(self, stage: EvalStage) -> ClipFilterLoader:
        config = replace(
            self._loader_config,
            record=None,
            record_embeddings=None,
            drop_last=False,
            end=self.hparams["val_end"],
            batches_per_epoch=None,
            num_streams=None,
            persistent_workers=False,
        )
        is_filtered = self.hparams[f"filter_{stage}"]
        return self._loader(self._eval_shards(stage), config, is_filtered=is_filtered, shuffle=0)

    def _loader(
        self, shards: str | list[str], config: LoaderConfig, *, is_filtered: bool, shuffle: int, epoch: int = 0
    ) -> ClipFilterLoader:
        trainer, scorer = self.trainer, self._scorer
        if scorer is None:
            raise RuntimeError('the data module has no model yet; call its setup("fit") first')
        is_scored = is_filtered or self.hparams["score_unfiltered"] or isinstance(scorer, ScoreFolder)
        if not is_filtered:
            config = replace(config, threshold=None)
        if not is_scored:
            config = replace(config, record=None, record_embeddings=None)
        dataset = ClipWebDataset(
            shards,
            None if isinstance(scorer, ScoreFolder) else scorer.preprocess,
            image_transform=self._image_transform,
            text_transform=self._text_transform,
            columns=self.hparams["columns"],
            sample_transform=self._sample_transform,
            shuffle=shuffle,
            seed=self.hparams["seed"],
            layout=SampleLayout(caption=_joined(self.hparams["caption"]), image=_joined(self.hparams["image"])),
            skip_missing_shards=self.hparams["skip_missing_shards"],
            world=None if trainer is None else World(rank=trainer.global_rank, world_size=trainer.world_size),
        )
        dataset.set_epoch(epoch)
        return ClipFilterLoader(dataset, scorer if is_scored else None, **asdict(config))


def _config(name: str, kind: type[Config], given: Config | Mapping[str, Any]) -> Config:
    """A config; made here where a checkpoint's hyperparameters are given."""
    if isinstance(given, Mapping):
        check_options(kind.__name__, given, kind)
        return kind(**given)
    if not isinstance(given, kind):
        shown = repr(given) if isinstance(given, str) else f"a {type(given).__name__}"
        raise TypeError(f"{name} is {shown}; give a {kind.__name__}, or a dict of its options")
    return given


def _joined(names: Any) -> Any:
    """Names as a layout has several of them."""
    return ",".join(names) if isinstance(names, list | tuple) else names


def _as_texts(paths: Any) -> Any:
    """Paths as texts, one or several."""
    if isinstance(paths, Path):
        return str(paths)
    return [str(path) for path in paths] if isinstance(paths, list | tuple) else paths


def _plain(config: ScorerConfig | LoaderConfig) -> dict[str, Any]:
    """A config as plain values, so that a checkpoint loads with ``weights_only``."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
