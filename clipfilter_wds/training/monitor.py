"""Logs how the filter does through Lightning's loggers."""

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader

from clipfilter_wds.training.fit_loader import FitLoader
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.types import DropReason


class ClipFilterMonitor(L.Callback):
    """Logs how the filter does, through the trainer's loggers, where these log: every ``log_every_n_steps`` steps.

    ``clipfilter/keep_rate``, ``clipfilter/score_mean`` (of the kept), ``clipfilter/dropped/<reason>`` (counts since
    training began), ``clipfilter/samples_per_second`` (scored), ``clipfilter/wait_share`` (of the time, in which
    training waited for data). Values are those of all ranks together. The training data are a ``ClipFilterDataModule``
    or a ``ClipFilterLoader``.
    """

    def __init__(self) -> None:
        self._batch_ended = self._window_began = time.perf_counter()
        self._validation_began = 0.0
        self._waited = 0.0
        self._seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is a filter, and start the clock.

        Raises:
            TypeError: When there is none.
        """
        self._batch_ended = self._window_began = time.perf_counter()
        self._seen = _filter_loader(trainer).stats.seen

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how long the batch was waited for."""
        self._waited += time.perf_counter() - self._batch_ended

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, now and then."""
        self._batch_ended = time.perf_counter()
        if not _is_logged(trainer):
            return
        stats = _filter_loader(trainer).stats
        scores = batch["score"] if isinstance(batch, Mapping) and "score" in batch else torch.empty(0)
        numbers: dict[str, float] = {
            "seen": stats.seen,
            "kept": stats.kept,
            "seen_lately": stats.seen - self._seen,
            "seconds": self._batch_ended - self._window_began,
            "waited": self._waited,
            "score_sum": float(scores.sum()),
            "num_scores": len(scores),
            **{reason.value: stats.dropped.get(reason, 0) for reason in DropReason},
        }
        self._window_began, self._waited, self._seen = self._batch_ended, 0.0, stats.seen
        values = _values(_sums(trainer, numbers), trainer.world_size)
        self.log_dict(values, batch_size=1)  # type: ignore[attr-defined]  # callbacks get it

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start it again: time spent validating is neither training nor waiting."""
        paused = time.perf_counter() - self._validation_began
        self._batch_ended += paused
        self._window_began += paused


def _is_logged(trainer: L.Trainer) -> bool:
    """Whether the trainer's loggers are given what is logged after this batch; steps count on over the epochs."""
    fit_loop: Any = trainer.fit_loop  # whose progress Lightning types too widely
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    is_step = not fit_loop._should_accumulate()
    return bool(every) and is_step and (fit_loop.epoch_loop._batches_that_stepped + 1) % every == 0


def _filter_loader(trainer: L.Trainer) -> ClipFilterLoader:
    for given in CombinedLoader(trainer.train_dataloader).flattened:
        loader = given.loader if isinstance(given, FitLoader) else given
        if isinstance(loader, ClipFilterLoader):
            return loader
    raise TypeError(
        "ClipFilterMonitor finds no filter: train from a ClipFilterDataModule, trainer.fit(model, datamodule=...), or "
        "from a ClipFilterLoader"
    )


def _sums(trainer: L.Trainer, numbers: dict[str, float]) -> dict[str, float]:
    """The numbers added up over the ranks."""
    if trainer.world_size == 1:
        return numbers
    mine = torch.tensor(list(numbers.values()), dtype=torch.float64, device=trainer.strategy.root_device)
    return dict(zip(numbers, trainer.strategy.reduce(mine, reduce_op="sum").tolist(), strict=True))


def _values(sums: dict[str, float], world_size: int) -> dict[str, float]:
    """What is logged."""
    seconds = max(sums["seconds"], 1e-9)
    values = {
        "keep_rate": sums["kept"] / max(sums["seen"], 1),
        "samples_per_second": sums["seen_lately"] * world_size / seconds,
        "wait_share": sums["waited"] / seconds,
    }
    if sums["num_scores"]:
        values["score_mean"] = sums["score_sum"] / sums["num_scores"]
    values.update({f"dropped/{reason}": float(sums[reason]) for reason in DropReason if sums[reason]})
    return {f"clipfilter/{name}": value for name, value in values.items()}
