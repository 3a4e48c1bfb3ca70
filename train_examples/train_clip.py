"""Train a small CLIP with Lightning on shards that are filtered inline. LightningCLI: options, YAML, checkpoints.

python train_examples/train_clip.py fit --config configs/inline_one_gpu.yaml
python train_examples/train_clip.py fit --config configs/inline_ddp.yaml --trainer.devices 8
python train_examples/train_clip.py fit --config configs/inline_one_gpu.yaml --ckpt_path last.ckpt
python train_examples/train_clip.py fit --help
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from small_clip import SmallClip

from clipfilter_wds.training.datamodule import ClipFilterDataModule
from clipfilter_wds.training.monitor import ClipFilterMonitor


class ClipModule(L.LightningModule):
    """A small CLIP, trained from scratch on whatever the filter keeps.

    Args:
        width: Channels of both towers and size of the embeddings; a multiple of 32.
        learning_rate: The highest, after the warm-up.
        warmup_steps: Steps in which the learning rate rises to it.
    """

    def __init__(self, width: int = 128, learning_rate: float = 1e-3, warmup_steps: int = 100) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.clip = SmallClip(width)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = self.clip(batch["image"], batch["text"])
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["text"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = self.clip(batch["image"], batch["text"])
        self.log("val_loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch["text"]))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, weight_decay=0.05)
        warmup_steps = self.hparams.warmup_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run a command; without ``args``, that of the command line."""
    return LightningCLI(
        ClipModule,
        ClipFilterDataModule,
        trainer_defaults={"callbacks": [ClipFilterMonitor()]},
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=None if args is None else list(args),
    )


if __name__ == "__main__":
    main()
