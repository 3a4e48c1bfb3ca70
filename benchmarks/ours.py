"""What is measured of this package: shards rewritten, batches for training, rows of a table."""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.material import Data, make_model
from benchmarks.options import Options
from benchmarks.rounds import Contender, Outcome
from clipfilter_wds import ClipFilterLoader, ClipScorer, ClipWebDataset, RewriteConfig, ScoreConfig, process_shards
from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.tables.scoring import Pair, batched, score_pairs
from clipfilter_wds.training.keep_rate import StarvationError

#: Of a GPU's loop, in which more are scored together.
_LARGEST_TRAIN_BATCH = 256

#: Keeps part of the samples by the tiny model's scores.
_TINY_THRESHOLD = 0.1


def our_contenders(options: Options, scorer: ClipScorer, threshold: float, *, suffix: str = "") -> list[Contender]:
    """All uses of a scorer."""
    uses = (Rewrite, InlineLoader, Table)
    return [Contender(f"{use.name}{suffix}", use(options, scorer, threshold)) for use in uses]


class _Use:
    name: str

    def __init__(
        self,
        options: Options,
        scorer: ClipScorer,
        threshold: float,
        watch: Callable[[int], None] = lambda num_samples: None,
    ) -> None:
        self._options, self._scorer, self._threshold = options, scorer, threshold
        self._watch = watch  # is told how many samples are scored


class Rewrite(_Use):
    """``clipfilter-wds rewrite``, the writing included."""

    name = "rewrite"

    def __call__(self, data: Data) -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            config = RewriteConfig(
                shards=[*data.shards],
                output=folder,
                threshold=self._threshold,
                batch_size=self._options.batch_size,
                num_workers=self._options.workers,
            )
            tally = process_shards(config, self._scorer, on_progress=lambda tally: self._watch(tally.num_scored))
            kept = _kept_keys(Path(folder, "_scores"), self._threshold)
            return Outcome(tally.counts.seen, kept, num_rechecked=tally.stats.rechecked)


def _kept_keys(folder: Path, threshold: float) -> frozenset[str]:
    tables = [ShardScores.read(path) for path in folder.glob("*.parquet")]
    return frozenset(
        key for table in tables for key, keep in zip(table.keys, select(table, threshold).keep, strict=True) if keep
    )


class InlineLoader(_Use):
    """``ClipFilterLoader``, whose batches nobody trains on."""

    name = "inline loader"

    def __call__(self, data: Data) -> Outcome:
        loader = ClipFilterLoader(
            ClipWebDataset([*data.shards], self._scorer.preprocess),
            self._scorer,
            threshold=self._threshold,
            batch_size=min(self._options.batch_size, _LARGEST_TRAIN_BATCH),  # each says how far it is
            score_batch_size=self._options.batch_size,
            num_workers=self._options.workers,
        )
        kept: list[str] = []
        with suppress(StarvationError):  # of the few samples of a short turn, none may be kept
            for batch in loader:
                kept += batch["__key__"]
                self._watch(loader.stats.seen)
        return Outcome(loader.stats.seen, frozenset(kept))


class Table(_Use):
    """What ``clipfilter-wds table`` and the DataFlow operator do, without reading and writing the table."""

    name = "table"

    def __call__(self, data: Data) -> Outcome:
        pairs = [Pair(os.fspath(image), caption) for image, caption in data.rows]
        batches = ((batch, batch) for batch in batched(pairs, self._options.batch_size))
        keep: list[bool] = []
        recheck = Recheck(self._scorer, self._threshold)
        for _, scores in score_pairs(batches, recheck, folder=Path(), num_workers=self._options.workers):
            keep += scores.keep(self._threshold).tolist()
        return Outcome(len(keep), frozenset(f"{number:09d}" for number, kept in enumerate(keep) if kept))


class RewriteFromScores:
    """``clipfilter-wds rewrite --scores``, with no model and no decoding.

    Whose scores they are makes no difference, so those of the tiny model will do.
    """

    name = "rewrite --scores"

    def __init__(self, options: Options, shares: Sequence[float]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        scorer = ClipScorer(make_model(options.cache, "tiny"), device="cpu")
        for data in map(options.data, shares):
            process_shards(ScoreConfig(shards=[*data.shards], output=self._scores(data)), scorer)

    def _scores(self, data: Data) -> Path:
        return Path(self._folder.name, str(len(data.rows)))

    def __call__(self, data: Data) -> Outcome:
        with tempfile.TemporaryDirectory() as output:
            config = RewriteConfig(
                shards=[*data.shards], output=output, scores=self._scores(data), threshold=_TINY_THRESHOLD
            )
            return Outcome(process_shards(config).counts.seen)
