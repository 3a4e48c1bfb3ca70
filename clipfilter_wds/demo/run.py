"""Runs the demo: draws shards with known mistakes, filters them with the bundled CLIP, compares with the truth."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from clipfilter_wds.console import printable
from clipfilter_wds.demo.config import DemoConfig
from clipfilter_wds.demo.overview import Picture, write_overview
from clipfilter_wds.demo.ownership import FILTERED, OVERVIEW, REPORT, SHARDS, check_own
from clipfilter_wds.demo.shards import MISMATCHED_PERCENT, NUM_SHARDS, SAMPLES_PER_SHARD, draw_demo_shards, write_shards
from clipfilter_wds.models.loading import BUNDLED_MODELS
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.config import RewriteConfig
from clipfilter_wds.offline.progress import run_with_progress
from clipfilter_wds.preprocess.members import read_captions
from clipfilter_wds.report.config import ReportConfig
from clipfilter_wds.report.run import write_report
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.samples import SampleLayout, read_samples
from clipfilter_wds.storage.publish import check_writable
from clipfilter_wds.types import Sample

MODEL = "demo-tiny"


def run_demo(config: DemoConfig, *, quiet: bool = False) -> None:
    """Draw shards with known mistakes, filter them with the bundled tiny CLIP, and compare with the truth.

    Raises:
        ValueError: When the output can't be written, or holds files that the demo did not write.
    """
    folder = config.folder
    console = Console(quiet=quiet, markup=False, emoji=False)  # the folder's name may look like either
    console.print(
        f"Drawing {NUM_SHARDS} shards of {SAMPLES_PER_SHARD} scenes: {MISMATCHED_PERCENT} % carry "
        "another scene's caption, six are odd or broken, and one shard is torn.",
        highlight=False,
    )
    drawn = draw_demo_shards()
    check_own(folder, drawn)
    for subfolder in (SHARDS, FILTERED):
        check_writable(folder / subfolder)
    shards = write_shards(folder / SHARDS, drawn)
    threshold = demo_threshold()
    rewrite = RewriteConfig(shards=str(folder / SHARDS), output=folder / FILTERED, threshold=threshold)
    run_with_progress(rewrite, lambda: ClipScorer(MODEL), quiet=quiet, reports=True)

    decided = [pair for shard in shards for pair in _decided(shard, folder / FILTERED, threshold)]
    truth = Truth.of(decided)
    write_overview(folder / OVERVIEW, decided, threshold)
    write_report(ReportConfig(scores=rewrite.output, shards=shards, output=folder / REPORT))
    shown = printable(str(folder))
    console.print(
        f"\nAgainst the truth: precision {truth.precision:.3f}, recall {truth.recall:.3f} "
        f"({truth.kept_matched} true pairs kept of {truth.matched}, {truth.kept - truth.kept_matched} false ones).\n"
        f"What was kept and dropped, and what other thresholds would keep: {shown}/{REPORT}\n"
        f"Some of it as a picture: {shown}/{OVERVIEW}\n\n"
        "The same by hand, into another folder, with a report of its own:\n"
        f"  clipfilter-wds rewrite {shlex.quote(f'{shown}/{SHARDS}')} --output {shlex.quote(f'{shown}/by_hand')} "
        f"--model {MODEL} --threshold {threshold} --report {shlex.quote(f'{shown}/by_hand.html')}\n"
        f"{MODEL} knows drawn scenes only. For photographs: --model openai/clip-vit-base-patch32",
        highlight=False,
        soft_wrap=True,
    )


def demo_threshold() -> float:
    """The bundled model's threshold, which was chosen on validation scenes."""
    return float(json.loads((BUNDLED_MODELS[MODEL] / "clipfilter.json").read_bytes())["threshold"])


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Compares the decisions with the truth, over the pairs that could be scored."""

    matched: int
    kept: int
    kept_matched: int

    @classmethod
    def of(cls, pictures: Sequence[Picture]) -> "Truth":
        """Count the pictures."""
        return cls(
            matched=sum(picture.matched for picture in pictures),
            kept=sum(picture.kept for picture in pictures),
            kept_matched=sum(picture.kept and picture.matched for picture in pictures),
        )

    @property
    def precision(self) -> float:
        """Share of the kept pairs whose caption is true."""
        return self.kept_matched / self.kept if self.kept else 0.0

    @property
    def recall(self) -> float:
        """Share of the pairs with a true caption that were kept."""
        return self.kept_matched / self.matched if self.matched else 0.0


def _decided(shard: Path, output: Path, threshold: float) -> Iterator[Picture]:
    """Yield the pairs of a shard that could be scored, with score and decision from its table."""
    table = ShardScores.read(output / "_scores" / f"{shard.stem}.parquet")
    keep, usable, scores = select(table, threshold).keep, table.usable, table.scores
    layout = SampleLayout()
    with open_shard(str(shard)) as opened:
        for sample in read_samples(opened, layout):
            if isinstance(sample, Sample) and usable[sample.index]:
                data = {member.extension: member.data for member in sample.members}
                yield Picture(
                    image=data.get("jpg") or data["png"],
                    caption=read_captions(data, layout)[0],
                    score=float(scores[sample.index]),
                    kept=bool(keep[sample.index]),
                    matched=json.loads(data["json"])["matched"],
                )
