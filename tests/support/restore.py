"""Checks that a loader that is stopped after any batch resumes exactly, in a fresh process."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.training.dataset import ClipWebDataset
from clipfilter_wds.training.loader import ClipFilterLoader
from clipfilter_wds.types import FilterStats
from clipfilter_wds.world import World
from tests.support.processes import run_ranks
from tests.support.toys import encoded, photo, write_tar

#: Per batch its keys; per epoch its batches.
Epochs = list[list[list[str]]]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a loader; unlike a loader, it can be sent to another process."""

    clip: Path
    shards: str | list[str]
    dataset: Mapping[str, Any] = field(default_factory=dict)
    loader: Mapping[str, Any] = field(default_factory=dict)
    #: Folder of score tables to take the scores from, instead of the model.
    scores: Path | None = None

    def build(self, **options: Any) -> ClipFilterLoader:
        if self.scores is not None:
            dataset = ClipWebDataset(self.shards, **self.dataset)
            return ClipFilterLoader(dataset, ScoreFolder(self.scores), **{**self.loader, **options})
        scorer = load_scorer(self.clip)
        dataset = ClipWebDataset(self.shards, scorer.preprocess, **self.dataset)
        return ClipFilterLoader(dataset, scorer, **{**self.loader, **options})

    def from_table(self, scores: Path) -> "Recipe":
        """The same with the scores of a table."""
        return replace(self, scores=scores)

    def but(self, **options: Any) -> "Recipe":
        """The same with other loader options."""
        return replace(self, loader={**self.loader, **options})

    def but_dataset(self, **options: Any) -> "Recipe":
        """The same with other dataset options."""
        return replace(self, dataset={**self.dataset, **options})


@cache
def load_scorer(clip: Path) -> ClipScorer:
    """The model of a folder, loaded once per process."""
    return ClipScorer(clip, device="cpu")


def keys(loader: ClipFilterLoader, num_epochs: int = 1) -> Epochs:
    """The keys of the next epochs."""
    return [[batch["__key__"] for batch in loader] for _ in range(num_epochs)]


def flat(epochs: Epochs) -> list[str]:
    """All keys of some epochs, in order."""
    return [key for epoch in epochs for batch in epoch for key in batch]


@dataclass(frozen=True, slots=True)
class Stop:
    """A loader stopped in an epoch, after so many of its batches; its state as JSON."""

    epoch: int
    batches: int
    state: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one rank's loader gave and said: keys, stops after every batch and after none, counts after all epochs."""

    epochs: Epochs
    stops: list[Stop]
    stats: FilterStats


def check_restores_after_every_batch(recipe: Recipe, *, num_epochs: int = 2, world_size: int = 1) -> list[Record]:
    """Stop after every batch in turn, restore in fresh processes, and compare with an uninterrupted run.

    Keys of all further batches, and the counts after them, must be the same. Returns what each rank did uninterrupted.
    """
    records = run_ranks(world_size, record, recipe, num_epochs)
    resumed_of = run_ranks(world_size, resume_each, recipe, num_epochs, [record.stops for record in records])
    for whole, resumed in zip(records, resumed_of, strict=True):
        for stop, (epochs, stats) in zip(whole.stops, resumed, strict=True):
            first, *others = whole.epochs[stop.epoch :]
            assert epochs == [first[stop.batches :], *others], stop
            if any(epochs):  # else a loader without end has no reason to read on
                assert stats == whole.stats, stop
    return records


def record(recipe: Recipe, num_epochs: int) -> Record:
    """One uninterrupted run, and one run for each batch that is stopped after it."""
    loader = recipe.build()
    epochs = keys(loader, num_epochs)
    stops = [
        Stop(epoch, batches, json.dumps(state_after(recipe.build(), epoch, batches)))
        for epoch, all_batches in enumerate(epochs)
        for batches in range(len(all_batches) + 1)
    ]
    return Record(epochs=epochs, stops=stops, stats=loader.stats)


def state_after(loader: ClipFilterLoader, epoch: int, batches: int) -> dict[str, Any]:
    """The state of a loader that is broken off in an epoch, after so many of its batches."""
    keys(loader, epoch)
    iterator = iter(loader)
    assert len(list(islice(iterator, batches))) == batches
    iterator.close()
    return loader.state_dict()


def resume_each(recipe: Recipe, num_epochs: int, stops: list[list[Stop]]) -> list[tuple[Epochs, FilterStats]]:
    """Resume from each of this rank's stops to the end."""
    results = []
    for stop in stops[World.current().rank]:
        loader = recipe.build()
        loader.load_state_dict(json.loads(stop.state))
        results.append((keys(loader, num_epochs - stop.epoch), loader.stats))
    return results


# --- pairs that tell which they are ---

#: Numbers of the pairs in each of four shards.
NUMBERS = [[1000 * shard + number for number in range(12)] for shard in range(4)]


def numbered_pair(number: int) -> dict[str, bytes]:
    """A pair whose image and caption both tell its number."""
    image = photo(number)
    image.putpixel((0, 0), (number >> 16, number >> 8 & 255, number & 255))
    return {"png": encoded(image, "PNG"), "txt": f"photo number {number}".encode()}


def image_number(image: Image.Image) -> torch.Tensor:
    """The training view of a numbered pair's image: its number."""
    red, green, blue = image.getpixel((0, 0))
    return torch.tensor(red << 16 | green << 8 | blue)


def text_number(caption: str) -> int:
    """The training view of a numbered pair's caption: its number."""
    return int(caption.split()[-1])


def write_numbered(folder: Path, shards: list[list[int]]) -> str:
    """A shard of numbered pairs for each list of numbers; returns what names them all."""
    for shard, numbers in enumerate(shards):
        members = [(f"{number:09d}", numbered_pair(number)) for number in numbers]
        write_tar(
            folder / f"{shard:05d}.tar",
            [(f"{key}.{extension}", data) for key, sample in members for extension, data in sample.items()],
        )
    return f"{folder}/*.tar"


def score_by_key(recipe: Recipe) -> dict[str, float]:
    """The score of every usable sample."""
    batches = list(recipe.but(threshold=None).build(num_workers=0))
    return {
        key: score for batch in batches for key, score in zip(batch["__key__"], batch["score"].tolist(), strict=True)
    }


def threshold_that_keeps(share: float, scores: dict[str, float]) -> float:
    """A threshold that keeps this share of the samples, at least one unless the share is 0."""
    ranked = sorted(scores.values(), reverse=True)
    num_kept = max(round(share * len(ranked)), 1) if share else 0
    if num_kept == len(ranked):
        return 0.0
    if not num_kept:
        return 1.0
    assert ranked[num_kept] > 0, "too many of the scores are negative"
    return (ranked[num_kept - 1] + ranked[num_kept]) / 2


def expected_keys(recipe: Recipe, scores: dict[str, float]) -> list[str]:
    """The keys of the samples that a loader keeps, sorted."""
    threshold = recipe.loader["threshold"]
    return sorted(key for key, score in scores.items() if min(max(score, 0.0), 1.0) >= threshold)
