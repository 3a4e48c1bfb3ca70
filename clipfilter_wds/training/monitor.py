"""Logs how the filter does through Lightning's loggers."""

import time
from typing import Any

import lightning as L

from clipfilter_wds.training.loader import ClipFilterLoader


class ClipFilterMonitor(L.Callback):
    """Logs how the filter does, through the trainer's loggers, every ``log_every_n_steps`` of the trainer.

    ``clipfilter/keep_rate``, ``clipfilter/score_mean`` (of the kept), ``clipfilter/dropped/<reason>`` (counts since
    training began), ``clipfilter/samples_per_second`` (scored), ``clipfilter/wait_share`` (of the time, in which
    training waited for data). Values are rank zero's.
    """

    def __init__(self) -> None:
        self._batch_ended = self._window_began = time.perf_counter()
        self._validation_began = 0.0
        self._waited = 0.0
        self._seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is a filter, and start the clock."""
        self._batch_ended = self._window_began = time.perf_counter()
        self._seen = self._loader(trainer).stats.seen

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
        if (batch_idx + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]  # set by a connector
            return
        stats, seconds = self._loader(trainer).stats, self._batch_ended - self._window_began
        self.log_dict(  # type: ignore[attr-defined]  # the trainer gives callbacks this method
            {
                "clipfilter/keep_rate": stats.keep_rate,
                "clipfilter/samples_per_second": (stats.seen - self._seen) / max(seconds, 1e-9),
                "clipfilter/wait_share": self._waited / max(seconds, 1e-9),
                **({"clipfilter/score_mean": batch["score"].float().mean()} if "score" in batch else {}),
                **{f"clipfilter/dropped/{reason}": float(count) for reason, count in stats.dropped.items()},
            },
            rank_zero_only=True,
            batch_size=1,
        )
        self._window_began, self._waited, self._seen = self._batch_ended, 0.0, stats.seen

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start it again: time spent validating is neither training nor waiting."""
        paused = time.perf_counter() - self._validation_began
        self._batch_ended += paused
        self._window_began += paused

    @staticmethod
    def _loader(trainer: L.Trainer) -> ClipFilterLoader:
        loader = getattr(getattr(trainer, "datamodule", None), "train_loader", None)
        if not isinstance(loader, ClipFilterLoader):
            raise TypeError("ClipFilterMonitor needs a ClipFilterDataModule: trainer.fit(model, datamodule=...)")
        return loader
