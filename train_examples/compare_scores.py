"""Does a better score pay? Train one small CLIP on what the cosine, negCLIPLoss and chance choose, and compare.

    python train_examples/compare_scores.py                       # takes twenty minutes on a core that is shared
    python train_examples/compare_scores.py --steps 5 --seeds 1   # to see it run

Of the drawn pairs, half have a true caption, a quarter another scene's, and a quarter a generic one that is true of any
scene and tells it from none ("a picture"). Each choice keeps half of all pairs. The runs of a seed begin with the same
weights and make the same number of steps; then they look for the captions of scenes that none of them has seen.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import numpy as np
import webdataset as wds
from filtering_pays import GALLERY_SIZE, Plan, Training
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from retrieval import Galleries
from rich.console import Console
from rich.table import Table

from clipfilter_wds import ClipScorer, RescoreConfig, RewriteConfig, ScoreConfig, process_shards, rescore_shards
from clipfilter_wds.demo.drawing import draw, to_jpeg
from clipfilter_wds.demo.run import MODEL
from clipfilter_wds.demo.scenes import describe, different_scene, random_scene
from clipfilter_wds.scores.table import ShardScores

KEPT_FRACTION = 0.5
GENERIC_CAPTIONS = (
    "a picture",
    "an image of shapes",
    "a drawing",
    "shapes on a background",
    "simple clip art",
    "a photo",
    "an image showing shapes in flat colours",
    "drawn by a computer",
)
CHOICES = ("cosine", "neg_clip_loss", "chance")


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came of one choice with one seed.

    Attributes:
        true_share: Share of the kept pairs whose caption is true of its scene and not generic.
        generic_share: Share of them whose caption is generic.
        auc_generic: How often a true caption scores above a generic one; of chance, 0.5.
        auc_mispaired: How often it scores above another scene's.
        image_to_text: Held-out recall after the training.
        text_to_image: The reverse.
    """

    true_share: float
    generic_share: float
    auc_generic: float
    auc_mispaired: float
    image_to_text: float
    text_to_image: float


def kind_of(key: str) -> str:
    return ("mispaired", "true", "generic", "true")[int(key) % 4]


def draw_shards(folder: Path, *, num_samples: int, seed: int) -> str:
    """Draw shards of scenes with the three kinds of captions; return what names them all."""
    rng = random.Random(seed)
    folder.mkdir()
    with wds.ShardWriter(f"{folder}/%05d.tar", maxcount=1000, verbose=0) as shards:
        for number in range(num_samples):
            scene, key = random_scene(rng, held_out=False), f"{number:09d}"
            told = different_scene(scene, rng, held_out=False) if kind_of(key) == "mispaired" else scene
            caption = rng.choice(GENERIC_CAPTIONS) if kind_of(key) == "generic" else describe(told, rng)
            shards.write({"__key__": key, "jpg": to_jpeg(draw(scene)), "txt": caption})
    return f"{folder}/*.tar"


def score(shards: str, folder: Path, scorer: ClipScorer) -> dict[str, Path]:
    """Score by cosine, from that by negCLIPLoss; the folders of tables."""
    cosine, neg_clip_loss = folder / "cosine", folder / "neg_clip_loss"
    process_shards(ScoreConfig(shards=shards, output=cosine, embeddings="fp16", num_workers=1), scorer)
    rescore_shards(RescoreConfig(scores=cosine, output=neg_clip_loss, method="neg_clip_loss", device="cpu"))
    return {"cosine": cosine, "neg_clip_loss": neg_clip_loss}


def by_kind(tables: Path) -> dict[str, np.ndarray]:
    """The scores of each kind of caption."""
    scores: dict[str, list[float]] = {"true": [], "mispaired": [], "generic": []}
    for path in tables.glob("*.parquet"):
        table = ShardScores.read(path)
        for key, one in zip(table.keys, table.scores.tolist(), strict=True):
            scores[kind_of(key)].append(one)
    return {kind: np.array(found) for kind, found in scores.items()}


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """How often one of the first is higher than one of the second; ties count half."""
    below = np.sort(below)
    ranks = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")
    return float(ranks.mean() / (2 * len(below)))


def keep(choice: str, shards: str, tables: dict[str, Path], folder: Path, *, seed: int) -> list[str]:
    """Write shards of what a choice keeps; the keys."""
    keys = [key for path in sorted(tables["cosine"].glob("*.parquet")) for key in ShardScores.read(path).keys]
    if choice == "chance":
        keys = random.Random(seed).sample(keys, round(KEPT_FRACTION * len(keys)))
        (listed := folder.with_suffix(".txt")).write_text("\n".join(keys))
        process_shards(RewriteConfig(shards=shards, output=folder, scores=tables["cosine"], subset=listed))
    else:
        process_shards(RewriteConfig(shards=shards, output=folder, scores=tables[choice], keep_fraction=KEPT_FRACTION))
    kept = wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
    return [sample["__key__"] for sample in kept]


def compare(plan: Plan, scorer: ClipScorer, *, num_samples: int, galleries: int) -> dict[str, Found]:
    """What comes of each choice with the plan's seed."""
    held_out = Galleries.draw(scorer.preprocess, seed=plan.seed + 1000, num_galleries=galleries, size=GALLERY_SIZE)
    training, found = Training(plan, scorer.preprocess, held_out), {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        shards = draw_shards(folder / "raw", num_samples=num_samples, seed=plan.seed)
        tables = score(shards, folder, scorer)
        for choice in CHOICES:
            keys = keep(choice, shards, tables, folder / f"kept_{choice}", seed=plan.seed)
            outcome = training.run(f"seed {plan.seed}, {choice}", f"{folder}/kept_{choice}/*.tar", scorer=None)
            scores = by_kind(tables[choice]) if choice in tables else None
            found[choice] = Found(
                true_share=mean(kind_of(key) == "true" for key in keys),
                generic_share=mean(kind_of(key) == "generic" for key in keys),
                auc_generic=auc(scores["true"], scores["generic"]) if scores else 0.5,
                auc_mispaired=auc(scores["true"], scores["mispaired"]) if scores else 0.5,
                **asdict(outcome.recalls[-1][1]),
            )
    return found


def print_table(found: dict[str, list[Found]], plan: Plan) -> None:
    table = Table(
        "", "true captions", "generic", "AUC true/generic", "AUC true/mispaired", "image → text", "text → image"
    )
    for choice, outcomes in found.items():
        columns = [asdict(outcome).values() for outcome in outcomes]
        table.add_row(choice, *(_spread(values) for values in zip(*columns, strict=True)))
    table.title = f"held-out recall@1 among {GALLERY_SIZE} after {plan.steps} steps of {plan.batch_size} pairs"
    Console(width=140).print(table)


def _spread(values: tuple[float, ...]) -> str:
    return f"{mean(values):.1%}" + (f" ± {stdev(values):.1%}" if len(values) > 1 else "")


def main(
    output: Path = Path("compare_scores"),
    *,
    steps: PositiveInt = 120,
    batch_size: PositiveInt = 64,
    num_samples: PositiveInt = 4_000,
    learning_rate: float = 1.5e-3,
    galleries: PositiveInt = 3,
    seeds: PositiveInt = 3,
) -> None:
    """Train a small CLIP on the best half by the cosine, by negCLIPLoss, and by chance, and compare what they learned.

    Args:
        output: Folder for the figures (figures.json).
        steps: Training steps of each run.
        batch_size: Pairs per step.
        num_samples: Scenes drawn for each seed.
        learning_rate: Of AdamW, the highest.
        galleries: Groups of a hundred held-out scenes, each of which is a question in both directions.
        seeds: How many repetitions, each with scenes, weights and order of its own.
    """
    scorer = ClipScorer(MODEL, device="cpu")
    found: dict[str, list[Found]] = {choice: [] for choice in CHOICES}
    for seed in range(seeds):
        plan = Plan(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed, num_evaluations=1)
        for choice, outcome in compare(plan, scorer, num_samples=num_samples, galleries=galleries).items():
            found[choice].append(outcome)
    print_table(found, plan)
    output.mkdir(parents=True, exist_ok=True)
    setting = {"steps": steps, "batch_size": batch_size, "num_samples": num_samples, "kept_fraction": KEPT_FRACTION}
    runs = {choice: [asdict(outcome) for outcome in outcomes] for choice, outcomes in found.items()}
    (output / "figures.json").write_text(json.dumps({**setting, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    auto_cli(main)
