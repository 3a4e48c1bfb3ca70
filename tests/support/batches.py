"""Builds loaders from tables and from models, and takes all that they give."""

from pathlib import Path

import numpy as np
import torch

from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.offline.run import process_shards
from tests.support.restore import (
    Recipe,
    load_scorer,
    numbered_pair,
    write_numbered,
)
from tests.support.toys import write_shard


def write_mixed(folder: Path) -> str:
    """Numbered pairs, unusable samples among them, a torn shard, an empty one and one that is no tar."""
    write_numbered(folder, [[1000 * shard + number for number in range(12)] for shard in range(3)])
    good = [numbered_pair(3000 + number) for number in range(9)]
    odd = [{"png": good[0]["png"]}, {**good[1], "txt": b" "}, {**good[2], "png": b"\x89PNG"}, {"txt": b"x"}]
    write_shard(folder / "00003.tar", [*good[:3], *odd, *good[3:]], start=3000)
    torn = write_shard(folder / "00004.tar", [numbered_pair(4000 + number) for number in range(6)], start=4000)
    torn.write_bytes(torn.read_bytes()[:-11_000])
    write_shard(folder / "00005.tar", [])
    (folder / "00006.tar").write_bytes(b"garbage" * 1000)
    return f"{folder}/*.tar"


def write_scores(recipe: Recipe, folder: Path, **options) -> Path:
    """Score a loader's shards; the folder of their tables."""
    process_shards(ScoreConfig(shards=recipe.shards, output=folder, num_workers=0, **options), load_scorer(recipe.clip))
    return folder


def batches(recipe: Recipe, num_epochs: int = 2) -> tuple:
    """All that a loader gives and says."""
    loader = recipe.build()
    epochs = [[{**batch, "score": batch["score"].numpy()} for batch in loader] for _ in range(num_epochs)]
    return [batch for epoch in epochs for batch in epoch], loader.stats, loader.left_over


def check_same(ours: tuple, theirs: tuple) -> None:
    """Both are the same; scores up to what the other company in a scoring batch changes."""
    assert ours[1:] == theirs[1:]
    assert len(ours[0]) == len(theirs[0]) > 0
    for one, other in zip(ours[0], theirs[0], strict=True):
        assert one.keys() == other.keys()
        assert (one["__key__"], one["__url__"]) == (other["__key__"], other["__url__"])
        assert torch.equal(torch.as_tensor(one["image"]), torch.as_tensor(other["image"]))
        assert list(one["text"]) == list(other["text"])
        np.testing.assert_allclose(one["score"], other["score"], atol=1e-6)
