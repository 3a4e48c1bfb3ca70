"""Make the bundled tiny CLIP again: draw scenes, train on two CPU cores, measure, save in Hugging Face format.

    python train_examples/train_tiny_clip.py --output /tmp/tiny_clip --seed 0

Scenes of held-out colour-and-shape pairs are never drawn for training or for choosing the threshold; the table
printed at the end, and `clipfilter.json` in the output folder, are measured on nothing else.
"""

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning import LightningModule, Trainer, seed_everything
from tiny_clip_data import CaptionedPairs, false_pairs, random_pairs
from tiny_clip_figures import evaluate, print_table
from tiny_clip_model import build_model, build_processor
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus
from torch.utils.data import DataLoader
from transformers import CLIPModel, CLIPProcessor

import clipfilter_wds.demo

OUTPUT = Path(clipfilter_wds.demo.__file__).parent / "tiny_clip"


class TinyClip(LightningModule):
    def __init__(self, model: CLIPModel, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        output = self.model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"])
        cosine = output.image_embeds @ output.text_embeds.T
        true = torch.eye(len(cosine), dtype=torch.bool)
        false = false_pairs(batch["cores"])
        # Which of the batch's captions is this image's, and the reverse: as CLIP.
        logits = (self.model.logit_scale.exp() * cosine).masked_fill(~(true | false), -torch.inf)
        target = torch.arange(len(cosine))
        contrastive = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        # Is this caption true of this image: as SigLIP. One threshold has to hold for all images.
        margin = 16 * (cosine - 0.4)
        absolute = (softplus(-margin[true]).sum() + softplus(margin[false]).sum()) / len(cosine)
        self.log_dict({"contrastive": contrastive, "absolute": absolute}, on_step=False, on_epoch=True)
        return contrastive + absolute

    def on_train_epoch_end(self) -> None:
        losses = {name: f"{value.item():.3f}" for name, value in self.trainer.logged_metrics.items()}
        print(f"epoch {self.current_epoch}: {losses}", flush=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches), pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, *_: Any) -> None:
        # A small scale makes the loss ask for wide margins between cosines.
        self.model.logit_scale.data.clamp_(max=math.log(25))


def save(output: Path, model: CLIPModel, processor: CLIPProcessor, figures: dict[str, Any]) -> None:
    model.save_pretrained(output)
    processor.image_processor.save_pretrained(output)
    processor.tokenizer.save_pretrained(output)
    (output / "clipfilter.json").write_text(json.dumps(figures, indent=2) + "\n")
    (output / "model.safetensors").chmod(0o644)  # safetensors writes files that nobody else may read


def main(
    output: Path = OUTPUT,
    *,
    seed: int = 0,
    num_pairs: int = 16_000,
    epochs: int = 6,
    batch_size: int = 32,
    learning_rate: float = 1.5e-3,
    fast_dev_run: bool = False,
) -> None:
    """Train, measure and save the tiny CLIP.

    Args:
        output: folder to save into.
        seed: of scenes, captions, weights and order; the same seed and machine give the same model.
        num_pairs: scenes drawn for training, each together with a copy that differs in one attribute.
        epochs: passes over them.
        batch_size: pairs in a batch.
        learning_rate: the highest, after the warm-up.
        fast_dev_run: one batch of a few scenes, to see that everything runs.
    """
    seed_everything(seed)
    torch.set_num_threads(2)
    started = time.perf_counter()
    num_pairs, num_test = (batch_size, 64) if fast_dev_run else (num_pairs, 2000)
    rng = random.Random(seed)
    pairs = random_pairs(rng, num_pairs, held_out=False)
    processor = build_processor([caption for pair in pairs for caption in pair.captions(rng)])
    dataset = CaptionedPairs(pairs, processor, seed)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True, collate_fn=dataset.collate)
    drawn = time.perf_counter()

    model = build_model(processor.tokenizer)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, fast_dev_run=fast_dev_run, logger=False, enable_checkpointing=False
    )
    trainer.fit(TinyClip(model, learning_rate), loader)
    trained = time.perf_counter()

    figures = evaluate(model.eval(), processor, seed, num_test)
    save(output, model, processor, figures)
    print(f"{model.num_parameters():,} parameters; {drawn - started:.0f} s drawing, {trained - drawn:.0f} s training")
    print_table(figures)


if __name__ == "__main__":
    auto_cli(main)
