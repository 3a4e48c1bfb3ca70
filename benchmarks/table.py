"""Speed of ``ImageClipFilter`` against the row-at-a-time loop that it replaces, in turns in one process.

    python -m benchmarks.table                    # a CLIP of ViT-B/32's size, random weights
    python -m benchmarks.table --model demo-tiny  # the bundled model

The loop is the reference: Pillow, CLIPProcessor and CLIPModel in float32, one row after another.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jsonargparse import auto_cli
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from clipfilter_wds.operator import ImageClipFilter
from clipfilter_wds.scorer import BUNDLED_MODELS

_WORDS = ("a", "photo", "of", "small", "red", "dog", "cat", "house", "on", "the", "green", "grass", "large", "boat")


class RowLoop:
    """One row at a time."""

    def __init__(self, folder: Path) -> None:
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = CLIPProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def similarity(self, path: str, caption: str) -> float:
        image = Image.open(path).convert("RGB")
        inputs = self.processor(text=[caption], images=[image], return_tensors="pt", padding=True, truncation=True)
        output = self.model(**inputs)
        return min(max((output.image_embeds @ output.text_embeds.T).item(), 0.0), 1.0)

    def scores(self, table: pd.DataFrame) -> list[float]:
        return [self.similarity(row.image, row.caption) for row in table.itertuples()]


class Memory:
    """A storage that reads and writes no file, so that only scoring is timed."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table

    def read(self, output_type: str) -> pd.DataFrame:
        return self.table

    def write(self, table: pd.DataFrame) -> None:
        self.kept = table


def random_vit_b32(folder: Path) -> Path:
    """ViT-B/32 in all but its weights, which need a hub; a forward pass costs the same."""
    tokenizer_and_processor = CLIPProcessor.from_pretrained(BUNDLED_MODELS["demo-tiny"])
    size = {"height": 224, "width": 224}
    tokenizer_and_processor.image_processor.size = {"shortest_edge": 224}
    tokenizer_and_processor.image_processor.crop_size = size
    tokenizer = tokenizer_and_processor.tokenizer
    tokenizer.model_max_length = 77
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=ids)).save_pretrained(folder)
    tokenizer_and_processor.save_pretrained(folder)
    return folder


def write_images(folder: Path, num_rows: int, image_size: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(num_rows):
        noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        path = folder / f"{number:05d}.jpg"
        noise.resize((image_size, image_size * 3 // 4), Image.Resampling.BICUBIC).save(path, quality=90)
        rows.append({"image": str(path), "caption": " ".join(rng.choice(_WORDS, rng.integers(5, 15)))})
    return pd.DataFrame(rows)


def main(
    model: Literal["vit-b32", "demo-tiny"] = "vit-b32",
    num_rows: int = 256,
    image_size: int = 512,
    rounds: int = 5,
) -> None:
    """Time both, in turns.

    Args:
        model: vit-b32 (random weights) or demo-tiny.
        num_rows: Rows of the table.
        image_size: Width of the JPEGs, in pixels.
        rounds: How often each is timed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = BUNDLED_MODELS[model] if model == "demo-tiny" else random_vit_b32(Path(scratch) / "clip")
        images = Path(scratch) / "images"
        images.mkdir()
        table = write_images(images, num_rows, image_size)
        operator, loop = ImageClipFilter(str(folder), device="cpu"), RowLoop(folder)
        operator.run(Memory(table.head(8)))
        # Random models score anywhere, so the threshold is one that keeps half, and no score is near it.
        scores = np.sort(loop.scores(table))
        middle = scores[num_rows // 4 : -(num_rows // 4)]
        widest = int(np.diff(middle).argmax())
        threshold = float(middle[widest : widest + 2].mean())
        num_kept = int((scores >= threshold).sum())
        ratios = []
        for number in range(rounds):
            started = time.perf_counter()
            operator.run(storage := Memory(table), threshold=threshold)
            ours = time.perf_counter() - started
            started = time.perf_counter()
            loop.scores(table)
            theirs = time.perf_counter() - started
            if len(storage.kept) != num_kept:
                raise SystemExit(f"kept {len(storage.kept)} rows, the loop {num_kept}")
            ratios.append(theirs / ours)
            print(
                f"round {number + 1}: {num_rows / ours:7.1f} rows/s, row loop {num_rows / theirs:7.1f} rows/s, "
                f"ratio {ratios[-1]:.2f}",
                flush=True,
            )
        print(f"{model}, {torch.get_num_threads()} threads: median ratio {median(ratios):.2f}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
