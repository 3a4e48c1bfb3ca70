"""Fits a tiny model with real Trainers; it remembers what it was trained on."""

import os
import warnings
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import torch

from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.training.datamodule import ClipFilterDataModule
from clipfilter_wds.world import World
from tests.support.toys import pair, write_shard

#: Has Lightning load checkpoints of its own. Before 2.6 it always does, and there is no such option.
TRUSTED = {"weights_only": False} if "weights_only" in signature(L.Trainer.fit).parameters else {}

THRESHOLD = 0.12  # keeps about 60 % of the pairs of write_fit_shards


def write_fit_shards(folder: Path) -> None:
    """Four shards of 20 pairs, 0.tar with the keys 0 to 19, 1.tar with 1000 to 1019, and so on."""
    for shard in range(4):
        write_shard(folder / f"{shard}.tar", [pair(shard * 100 + number) for number in range(20)], start=1000 * shard)


class Recorder(L.LightningModule):
    """Remembers the epoch and keys of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(1, 1)
        self.trained, self.validated, self.tested = [], [], []

    def training_step(self, batch, index):
        self.trained.append([self.current_epoch, *batch["__key__"]])
        return self.weight(batch["image"].float().mean(dim=(1, 2, 3))[:, None]).mean()

    def validation_step(self, batch, index):
        self.validated.append(batch["__key__"])

    def test_step(self, batch, index):
        self.tested.append(batch["__key__"])

    def predict_step(self, batch, index):
        return batch["__key__"]

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


def data_module(options: dict[str, Any]) -> ClipFilterDataModule:
    return ClipFilterDataModule(**in_groups(options))


def on_ranks() -> dict[str, Any]:
    """Options of a Trainer, on each of the ranks that ``run_ranks`` started."""
    world = World.current()
    if world.world_size == 1:
        return {}
    environment = {"RANK": world.rank, "LOCAL_RANK": world.rank, "GROUP_RANK": 0, "WORLD_SIZE": world.world_size}
    os.environ.update({name: str(value) for name, value in environment.items()}, TORCHELASTIC_RUN_ID="test")  # torchrun
    return {"strategy": "ddp", "devices": world.world_size, "use_distributed_sampler": False}


def new_trainer(**options: Any) -> L.Trainer:
    """A Trainer that says and saves nothing, for two epochs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 1, **quiet, **options})


def fit(data: dict, trainer: dict, *, callbacks=(), checkpoint=None, module=None) -> Recorder:
    """Fit a tiny model, from a checkpoint if there is one, and return it."""
    module = module or Recorder()
    runner = new_trainer(callbacks=list(callbacks), **trainer)
    runner.fit(module, datamodule=data_module(data), ckpt_path=checkpoint, **TRUSTED)
    return module
