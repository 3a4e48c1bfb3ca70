"""Does filtering pay? Train one small CLIP on shards of which half are mispaired: as they are, filtered, rewritten.

    python train_examples/filtering_pays.py               # takes nine minutes on two cores
    python train_examples/filtering_pays.py --steps 50    # to see it run

The three runs begin with the same weights and make the same number of steps of the same size. They differ in what they
read: all pairs (raw), those that the filter keeps while training goes on (inline), those that `rewrite` kept before it
(rewritten). Then they look for the captions of scenes that none of them has seen, among a hundred, and the reverse.

The filter is the bundled CLIP. It was trained on true pairs of such drawn scenes, as a large CLIP was on photographs;
the trained CLIP has its architecture and tokenizer, and starts from scratch.
"""

import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import webdataset as wds
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from retrieval import Galleries, Recall
from rich.console import Console
from rich.table import Table
from tiny_clip_model import build_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPModel, CLIPTokenizer

from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset, RewriteConfig, process_shards
from clipfilter_wds.demo.drawing import draw, to_jpeg
from clipfilter_wds.demo.run import MODEL, demo_threshold
from clipfilter_wds.demo.scenes import describe, different_scene, random_scene
from clipfilter_wds.models.loading import BUNDLED_MODELS
from clipfilter_wds.palette import LIGHT

GALLERY_SIZE = 100


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the runs have in common."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    num_evaluations: int = 12


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run went.

    Attributes:
        ahead_seconds: Spent on filtering before training began.
        seconds: Spent training, evaluation left out.
        samples_read: Samples of the shards that training read, dropped ones included.
        true_share: Share of the trained pairs whose caption is true.
        recalls: Per evaluation, the step and the held-out recall.
    """

    ahead_seconds: float
    seconds: float
    samples_read: int
    true_share: float
    recalls: list[tuple[int, Recall]]


def draw_shards(folder: Path, *, num_samples: int, seed: int) -> str:
    """Draw shards of scenes, every second one with a caption that is false of it; return what names them all."""
    rng = random.Random(seed)
    folder.mkdir()
    with wds.ShardWriter(f"{folder}/%05d.tar", maxcount=1000, verbose=0) as shards:
        for number in range(num_samples):
            scene = random_scene(rng, held_out=False)
            told = scene if is_true(key := f"{number:09d}") else different_scene(scene, rng, held_out=False)
            shards.write({"__key__": key, "jpg": to_jpeg(draw(scene)), "txt": describe(told, rng)})
    return f"{folder}/*.tar"


def is_true(key: str) -> bool:
    return int(key) % 2 == 1


class Training:
    """The same training for whatever a loader gives."""

    def __init__(self, plan: Plan, preprocess: Any, galleries: Galleries) -> None:
        self.plan, self.preprocess, self.galleries = plan, preprocess, galleries
        self.tokenizer = CLIPTokenizer.from_pretrained(BUNDLED_MODELS[MODEL])

    def run(self, name: str, shards: str, scorer: ClipScorer | None, *, ahead_seconds: float = 0.0) -> Outcome:
        plan = self.plan
        loader = self._loader(shards, scorer)
        torch.manual_seed(plan.seed)
        model = build_model(self.tokenizer)
        optimizer = torch.optim.AdamW(model.parameters(), plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, plan.learning_rate, total_steps=plan.steps, pct_start=0.1
        )
        recalls, num_true, seconds = [(0, self._evaluate(model))], 0, 0.0
        began = time.perf_counter()
        for step, batch in enumerate(loader, start=1):
            loss = contrastive_loss(
                model, batch["image"], self.preprocess.tokenize([[caption] for caption in batch["text"]]).input_ids
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            model.logit_scale.data.clamp_(max=math.log(100))
            num_true += sum(map(is_true, batch["__key__"]))
            if step % max(1, plan.steps // plan.num_evaluations) == 0 or step == plan.steps:
                seconds += time.perf_counter() - began
                recall = self._evaluate(model)
                recalls.append((step, recall))
                print(
                    f"{name}: step {step}, loss {loss.item():.3f}, recall@1 {recall.image_to_text:.1%} image to text, "
                    f"{recall.text_to_image:.1%} text to image",
                    flush=True,
                )
                began = time.perf_counter()
        return Outcome(
            ahead_seconds=round(ahead_seconds, 1),
            seconds=round(seconds, 1),
            samples_read=loader.stats.seen,
            true_share=num_true / (plan.steps * plan.batch_size),
            recalls=recalls,
        )

    def _loader(self, shards: str, scorer: ClipScorer | None) -> ClipFilterLoader:
        """An endless stream of which one epoch is all the steps; filtered if there is a scorer."""
        dataset = ClipWebDataset(shards, self.preprocess, shuffle=1000, seed=self.plan.seed)
        return ClipFilterLoader(
            dataset,
            scorer,
            threshold=demo_threshold() if scorer else None,
            batch_size=self.plan.batch_size,
            num_workers=1,
            end="repeat",
            batches_per_epoch=self.plan.steps,
        )

    @torch.inference_mode()
    def _evaluate(self, model: CLIPModel) -> Recall:
        pixel_values, input_ids = self.galleries.pixel_values.flatten(0, 1), self.galleries.input_ids.flatten(0, 1)
        return self.galleries.recall(*embed(model, pixel_values, input_ids))


def embed(model: CLIPModel, pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalised embeddings [N, D] of uint8 images [N, 3, S, S] and of token ids [N, L]."""
    output = model(pixel_values=pixel_values / 63.75 - 2, input_ids=input_ids)  # mean 0.5, deviation 0.25
    return output.image_embeds, output.text_embeds


def contrastive_loss(model: CLIPModel, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
    images, texts = embed(model, pixel_values, input_ids)
    logits = model.logit_scale.exp() * images @ texts.T
    own = torch.arange(len(logits))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def print_table(outcomes: dict[str, Outcome], plan: Plan, num_questions: int) -> None:
    table = Table("", "true captions", "image → text", "text → image", "samples read", "seconds ahead", "training")
    for name, outcome in outcomes.items():
        recall = outcome.recalls[-1][1]
        shares = (f"{share:.1%}" for share in (outcome.true_share, recall.image_to_text, recall.text_to_image))
        table.add_row(
            name, *shares, f"{outcome.samples_read:,}", f"{outcome.ahead_seconds:.0f}", f"{outcome.seconds:.0f}"
        )
    table.title = f"held-out recall@1 among {GALLERY_SIZE} after {plan.steps} steps of {plan.batch_size} pairs"
    table.caption = f"chance: {1 / GALLERY_SIZE:.1%}; {num_questions:,} questions in each direction"
    Console(width=120).print(table)


def as_json(outcomes: dict[str, Outcome], plan: Plan, **setting: Any) -> str:
    runs = {
        name: {**asdict(outcome), "recalls": [{"step": step, **asdict(recall)} for step, recall in outcome.recalls]}
        for name, outcome in outcomes.items()
    }
    setting = {**asdict(plan), **setting, "threshold": demo_threshold(), "gallery_size": GALLERY_SIZE}
    return json.dumps({**setting, "chance": 1 / GALLERY_SIZE, "runs": runs}, indent=2) + "\n"


def import_pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install 'clipfilter-wds[plot]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(pyplot: Any, path: Path, outcomes: dict[str, Outcome]) -> None:
    """Draw both recalls over steps; on white, which reads well in light and dark pages."""
    figure, panels = pyplot.subplots(1, 2, figsize=(8.4, 3.4), sharey=True, layout="constrained")
    styles: Sequence[tuple[str, str, float]] = ((LIGHT.dropped, "-", 2), (LIGHT.kept, "-", 4), (LIGHT.ink, "--", 1.5))
    for panel, direction in zip(panels, ("image_to_text", "text_to_image"), strict=True):
        for (name, outcome), (colour, line, width) in zip(outcomes.items(), styles, strict=True):
            points = [(step, getattr(recall, direction)) for step, recall in outcome.recalls]
            panel.plot(*zip(*points, strict=True), line, color=colour, label=name, linewidth=width)
        panel.axhline(1 / GALLERY_SIZE, color=LIGHT.faint, linestyle=":", linewidth=1, label="chance")
        panel.set(title=direction.replace("_", " "), xlabel="training steps", ylim=(0, 1))
        panel.yaxis.set_major_formatter("{x:.0%}")
        panel.grid(color=LIGHT.line, linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(f"held-out recall@1 among {GALLERY_SIZE}")
    panels[0].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=200)
    pyplot.close(figure)


def main(
    output: Path = Path("filtering_pays"),
    *,
    steps: PositiveInt = 800,
    batch_size: PositiveInt = 64,
    num_samples: PositiveInt = 16_000,
    learning_rate: float = 1.5e-3,
    galleries: PositiveInt = 10,
    seed: int = 0,
) -> None:
    """Train a small CLIP on raw, inline-filtered and rewritten shards, and compare what the three learned.

    Args:
        output: Folder for the figures (figures.json) and the plot (recall.png).
        steps: Training steps of each run.
        batch_size: Pairs per step.
        num_samples: Scenes drawn for training; every second one has a false caption.
        learning_rate: Of AdamW, the highest.
        galleries: Groups of a hundred held-out scenes, each of which is a question in both directions.
        seed: Of scenes, weights and order.
    """
    pyplot = import_pyplot()  # not to find out after the training that it is missing
    plan = Plan(steps=steps, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    scorer = ClipScorer(MODEL, device="cpu")
    held_out = Galleries.draw(scorer.preprocess, seed=seed + 1, num_galleries=galleries, size=GALLERY_SIZE)
    training = Training(plan, scorer.preprocess, held_out)
    with TemporaryDirectory() as name:
        folder = Path(name)
        print(f"drawing {num_samples:,} scenes, half of them with a false caption", flush=True)
        shards = draw_shards(folder / "raw", num_samples=num_samples, seed=seed)
        outcomes = {
            "raw": training.run("raw", shards, scorer=None),
            "filtered inline": training.run("filtered inline", shards, scorer),
        }
        began = time.perf_counter()
        process_shards(RewriteConfig(shards=shards, output=folder / "kept", threshold=demo_threshold()), scorer)
        ahead = time.perf_counter() - began
        outcomes["rewritten ahead"] = training.run(
            "rewritten ahead", f"{folder}/kept/*.tar", scorer=None, ahead_seconds=ahead
        )
    print_table(outcomes, plan, galleries * GALLERY_SIZE)
    output.mkdir(parents=True, exist_ok=True)
    (output / "figures.json").write_text(as_json(outcomes, plan, num_samples=num_samples, galleries=galleries))
    plot(pyplot, output / "recall.png", outcomes)


if __name__ == "__main__":
    auto_cli(main)
