"""How well the bundled tiny CLIP tells true captions from false ones, and at which threshold."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from tiny_clip_data import random_pairs
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from transformers import CLIPModel, CLIPProcessor

from clipfilter_wds.demo.scenes import ATTRIBUTES, Attribute, describe, different_scene


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


def print_table(figures: dict[str, Any]) -> None:
    table = Table("", "held-out pairs", "trained pairs", title=f"threshold {figures['threshold']}")
    for name, value in figures["validation"].items():
        if isinstance(value, float):
            table.add_row(name, f"{figures[name]:.4f}", f"{value:.4f}")
    for name, value in figures["validation"]["auc_by_changed_attribute"].items():
        table.add_row(f"auc, {name} changed", f"{figures['auc_by_changed_attribute'][name]:.4f}", f"{value:.4f}")
    Console().print(table)
