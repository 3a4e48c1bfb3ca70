"""Fits a tiny model with real Trainers; it remembers what it was trained on."""

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import lightning as L
import torch

from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.datamodule import ClipFilterDataModule


class Recorder(L.LightningModule):
    """Remembers the epoch and keys of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.trained, self.validated = [], []

    def training_step(self, batch, index):
        self.trained.append([self.current_epoch, *batch["__key__"]])
        return self.weight(batch["image"].float().mean(dim=(1, 2, 3))[:, None]).mean()

    def validation_step(self, batch, index):
        self.validated.append(batch["__key__"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


class SaveEverywhere(L.Callback):
    """Saves a checkpoint after every batch and at the end of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_saved = folder, 0

    def on_train_batch_end(self, trainer, *_):
        self.num_saved += 1
        trainer.save_checkpoint(self.folder / f"batch{self.num_saved}.ckpt")

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"epoch{trainer.current_epoch}.ckpt")


def in_groups(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a data module, those of scorer and loader in their configs."""
    groups: dict[str, Any] = {}
    for name, kind in (("scorer", ScorerConfig), ("loader", LoaderConfig)):
        names = {field.name for field in fields(kind)}
        groups[name] = kind(**{name: value for name, value in options.items() if name in names})
        options = {name: value for name, value in options.items() if name not in names}
    return options | groups


def fit(data: dict, trainer: dict, *, callbacks=(), checkpoint=None, module=None) -> Recorder:
    """Fit a tiny model, from a checkpoint if there is one, and return it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module = module or Recorder()
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 1, **trainer}
    runner = L.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    runner.fit(module, datamodule=ClipFilterDataModule(**in_groups(data)), ckpt_path=checkpoint, weights_only=False)
    return module
