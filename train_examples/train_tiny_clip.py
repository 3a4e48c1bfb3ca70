"""Make the bundled tiny CLIP again: draw scenes, train on two CPU cores, measure, save in Hugging Face format.

    python train_examples/train_tiny_clip.py --output /tmp/tiny_clip --seed 0

Scenes of held-out colour-and-shape pairs are never drawn for training or for choosing the threshold; the table
printed at the end, and `clipfilter.json` in the output folder, are measured on nothing else.
"""

import io
import json
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning import LightningModule, Trainer, seed_everything
from PIL import Image
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus
from torch.utils.data import DataLoader, Dataset
from torchmetrics.functional.classification import binary_auroc
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

import clipfilter_wds.demo
from clipfilter_wds.demo.drawing import draw, to_jpeg
from clipfilter_wds.demo.scenes import (
    ATTRIBUTES,
    COLOURS,
    SHAPES,
    Attribute,
    Scene,
    Thing,
    change_one,
    describe,
    different_scene,
    random_scene,
)

OUTPUT = Path(clipfilter_wds.demo.__file__).parent / "tiny_clip"
IMAGE_SIZE = 64
NUM_TOKENS = 32
PROJECTION = 64
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: list[str], num_merges: int = 320) -> CLIPTokenizer:
    """Return a CLIP tokenizer whose merges are learned from the captions.

    Its vocabulary starts with every byte, inside a word and at its end, as OpenAI's does. So no text yields an unknown
    token, which CLIP writes as the end-of-text token, where the text tower would stop reading.
    """
    clip = CLIPTokenizer()  # for its normaliser and pre-tokeniser
    suffix = "</w>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    learner.normalizer = clip.backend_tokenizer.normalizer
    learner.pre_tokenizer = clip.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=num_merges + 2 * len(alphabet),
        initial_alphabet=alphabet,
        # Equally frequent merges are ordered by token id, and ids not fixed here follow a hash of each run's own.
        special_tokens=[letter + suffix for letter in alphabet],
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    words = [*alphabet, *(letter + suffix for letter in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=NUM_TOKENS)


def build_processor(captions: list[str]) -> CLIPProcessor:
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return CLIPProcessor(image_processor=image_processor, tokenizer=build_tokenizer(captions))


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
    shared = {"projection_dim": PROJECTION}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=PROJECTION,
        vision_config=vision | shared | {"image_size": IMAGE_SIZE, "patch_size": 8},
        text_config=text | shared | special | {"vocab_size": len(tokenizer), "max_position_embeddings": NUM_TOKENS},
    )
    return CLIPModel(config)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A scene and the same scene with one attribute changed: each one's caption is false of the other."""

    scene: Scene
    changed: Scene
    attribute: Attribute

    def captions(self, rng: random.Random) -> list[str]:
        return [describe(scene, rng, always=(self.attribute,)) for scene in (self.scene, self.changed)]

    def images(self, rng: random.Random) -> list[Image.Image]:
        """Return both as the demo's shards would hold them."""
        files = [to_jpeg(draw(scene), quality=rng.randint(80, 95)) for scene in (self.scene, self.changed)]
        return [Image.open(io.BytesIO(file)) for file in files]


def random_pairs(rng: random.Random, count: int, *, held_out: bool) -> list[Pair]:
    pairs = []
    for _ in range(count):
        scene = random_scene(rng, held_out=held_out)
        changed, attribute = change_one(scene, rng)
        # Another seed, so that the two images differ in all that no caption mentions, too.
        changed = replace(changed, seed=rng.getrandbits(32))
        pairs.append(Pair(scene=scene, changed=changed, attribute=attribute))
    return pairs


class DrawnPairs(Dataset[Tensor]):
    """Uint8 views [2, 3, S, S] of each pair, by the image processor that is saved with the model."""

    def __init__(self, pairs: list[Pair], image_processor: CLIPImageProcessor) -> None:
        self.pairs = pairs
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Tensor:
        images = self.pairs[index].images(random.Random(index))
        view = self.image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
        return view["pixel_values"]


def draw_all(pairs: list[Pair], image_processor: CLIPImageProcessor) -> Tensor:
    """Return uint8 views [N, 2, 3, S, S], drawn once: anew in every epoch would take half as long again."""
    loader = DataLoader(DrawnPairs(pairs, image_processor), batch_size=64, num_workers=2)
    return torch.cat(list(loader))


def core_number(thing: Thing) -> int:
    return (thing.count * len(COLOURS) + COLOURS.index(thing.colour)) * len(SHAPES) + SHAPES.index(thing.shape)


class CaptionedPairs(Dataset[tuple[Pair, Tensor]]):
    """Drawn pairs, whose captions are worded anew whenever a batch is collated."""

    def __init__(self, pairs: list[Pair], processor: CLIPProcessor, seed: int) -> None:
        self.pairs = pairs
        self.views = draw_all(pairs, processor.image_processor)
        self.processor = processor
        self.rng = random.Random(seed)
        self.mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Pair, Tensor]:
        return self.pairs[index], self.views[index]

    def collate(self, items: list[tuple[Pair, Tensor]]) -> dict[str, Tensor]:
        """Return a batch of 2N samples, in which 2i and 2i + 1 differ in one attribute."""
        scenes = [scene for pair, _ in items for scene in (pair.scene, pair.changed)]
        captions = [caption for pair, _ in items for caption in pair.captions(self.rng)]
        text = self.processor.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        views = torch.cat([view for _, view in items])
        cores = [[core_number(thing) for thing in (scene.things * 2)[:2]] for scene in scenes]
        return {
            "pixel_values": (views / 255 - self.mean) / self.std,
            "input_ids": text["input_ids"],
            "cores": torch.tensor(cores),
        }


def false_pairs(cores: Tensor) -> Tensor:
    """Return a bool matrix [image, caption]: where the caption is known to be false of the image.

    A caption that names a subset of an image's groups may be true of it by chance, except within a pair, whose
    captions always name what was changed.
    """
    named = (cores[:, None, None, :] == cores[None, :, :, None]).any(-1).all(-1)
    index = torch.arange(len(cores))
    partners = index[:, None] == (index ^ 1)[None, :]
    return ~named | partners


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


@torch.inference_mode()
def cosines(model: CLIPModel, processor: CLIPProcessor, images: list[Image.Image], captions: list[str]) -> Tensor:
    scores = []
    for start in range(0, len(images), 256):
        part = slice(start, start + 256)
        inputs = processor(images=images[part], text=captions[part], padding=True, truncation=True, return_tensors="pt")
        output = model(**inputs)
        scores.append((output.image_embeds * output.text_embeds).sum(-1))
    return torch.cat(scores)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Cosines of the same images with their own caption, another scene's, and their own with one attribute changed."""

    matched: Tensor
    random: Tensor
    changed: Tensor
    attributes: list[Attribute]


def score_fresh_scenes(model: CLIPModel, processor: CLIPProcessor, seed: int, count: int, *, held_out: bool) -> Scores:
    rng = random.Random(seed)
    pairs = random_pairs(rng, count, held_out=held_out)
    images = [pair.images(rng)[0] for pair in pairs]
    others = [different_scene(pair.scene, rng, held_out=held_out) for pair in pairs]
    return Scores(
        matched=cosines(model, processor, images, [describe(pair.scene, rng) for pair in pairs]),
        random=cosines(model, processor, images, [describe(other, rng) for other in others]),
        changed=cosines(model, processor, images, [pair.captions(rng)[1] for pair in pairs]),
        attributes=[pair.attribute for pair in pairs],
    )


def auc(positive: Tensor, negative: Tensor) -> float:
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).long()
    # torchmetrics takes scores outside [0, 1] for logits.
    return round(binary_auroc((torch.cat([positive, negative]) + 1) / 2, labels).item(), 4)


def best_threshold(matched: Tensor, mismatched: Tensor) -> float:
    """Return the middle of the cosines at which the balanced accuracy is highest, to two digits."""
    grid = torch.arange(0.0, 1.0, 0.005)
    accuracy = torch.stack([((matched >= t).float().mean() + (mismatched < t).float().mean()) / 2 for t in grid])
    return round(grid[accuracy >= accuracy.max() - 1e-6].mean().item(), 2)


def measure(scores: Scores, threshold: float) -> dict[str, Any]:
    kept_true, kept_random = (scores.matched >= threshold).sum().item(), (scores.random >= threshold).sum().item()
    of_attribute = {name: torch.tensor([name == other for other in scores.attributes]) for name in ATTRIBUTES}
    parts = {"matched": scores.matched, "random": scores.random, "one_attribute_changed": scores.changed}
    return {
        "auc_matched_vs_random": auc(scores.matched, scores.random),
        "auc_one_attribute_changed": auc(scores.matched, scores.changed),
        "auc_by_changed_attribute": {
            name: auc(scores.matched, scores.changed[chosen]) for name, chosen in of_attribute.items()
        },
        "precision": round(kept_true / max(kept_true + kept_random, 1), 4),
        "recall": round(kept_true / len(scores.matched), 4),
        "cosine_quantiles_01_50_99": {
            name: [round(part.quantile(q).item(), 3) for q in (0.01, 0.5, 0.99)] for name, part in parts.items()
        },
        "num_scenes": len(scores.matched),
    }


def evaluate(model: CLIPModel, processor: CLIPProcessor, seed: int, count: int) -> dict[str, Any]:
    """Choose the threshold on trained pairs, then measure on held-out ones."""
    validation = score_fresh_scenes(model, processor, seed + 1, count, held_out=False)
    test = score_fresh_scenes(model, processor, seed + 2, count, held_out=True)
    threshold = best_threshold(validation.matched, validation.random)
    chosen_by = "balanced accuracy of true against random captions; fresh scenes of trained pairs only"
    return {
        "threshold": threshold,
        **measure(test, threshold),
        "validation": {"threshold_chosen_by": chosen_by, **measure(validation, threshold)},
    }


def save(output: Path, model: CLIPModel, processor: CLIPProcessor, figures: dict[str, Any]) -> None:
    model.save_pretrained(output)
    processor.image_processor.save_pretrained(output)
    processor.tokenizer.save_pretrained(output)
    (output / "clipfilter.json").write_text(json.dumps(figures, indent=2) + "\n")
    (output / "model.safetensors").chmod(0o644)  # safetensors writes files that nobody else may read


def print_table(figures: dict[str, Any]) -> None:
    table = Table("", "held-out pairs", "trained pairs", title=f"threshold {figures['threshold']}")
    for name, value in figures["validation"].items():
        if isinstance(value, float):
            table.add_row(name, f"{figures[name]:.4f}", f"{value:.4f}")
    for name, value in figures["validation"]["auc_by_changed_attribute"].items():
        table.add_row(f"auc, {name} changed", f"{figures['auc_by_changed_attribute'][name]:.4f}", f"{value:.4f}")
    Console().print(table)


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
