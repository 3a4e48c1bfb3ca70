"""Scores shards. All that is needed is passed in, so that any process can do it."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Self

import numpy as np

from clipfilter_wds.models.batch_size import default_batch_size
from clipfilter_wds.models.recheck import NUM_MEASURED, BatchScores, Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.blocks import Block, BlockDataset, read_blocks
from clipfilter_wds.offline.commit import CURE, check_source
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.copying import CopyTask, shard_stats
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.selection import Choice, select
from clipfilter_wds.scores.subset import Subset
from clipfilter_wds.scores.table import ScoreMetadata, ShardScores
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.open import shard_num_bytes
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.shards.split import ShardPart
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.storage.publish import publish
from clipfilter_wds.types import ShardEnd, ShardError
from clipfilter_wds.workers.cpus import default_num_workers
from clipfilter_wds.workers.transport import Lent

#: Blocks that are looked through for usable samples to measure the error of the scores on.
MAX_MEASURED_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How shards are scored. Picklable.

    Attributes:
        layout: Where image and caption are.
        batch_size: Samples per forward pass; None chooses by model and device.
        num_workers: Processes that decode; None chooses by device and number of CPUs.
        threshold: Scores near it are computed in float32.
        worker_timeout: Seconds that one sample may take to decode; 0 for no limit.
        subset: Decode and score only the samples that are listed.
        measured_on: The run's first shards, whose first samples tell how far the scores are off. They are the same for
            every process that scores shards of the run, and when it is resumed, so that all compute the same bits.
    """

    layout: SampleLayout
    batch_size: int | None
    num_workers: int | None
    worker_timeout: float
    threshold: float | None = None
    subset: Subset | None = None
    measured_on: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: ScoreConfig) -> Self:
        """How the shards of a run are scored."""
        choice = config.choice if isinstance(config, RewriteConfig) else Choice()
        return cls(
            layout=config.layout,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            worker_timeout=config.worker_timeout,
            threshold=choice.threshold,
            subset=choice.subset,
            measured_on=tuple(config.urls[:MAX_MEASURED_BLOCKS]),
        )

    def fingerprint(self, scorer: ClipScorer) -> Fingerprint:
        """What the scores depend on beside the shards."""
        return {
            **scorer.fingerprint,
            **self.layout.fingerprint,
            **({} if self.subset is None else {"subset": self.subset.digest}),
        }

    def rechecked_at(self, fingerprint: Fingerprint) -> float | None:
        """What score tables say of the threshold; None when all scores are in float32."""
        return None if fingerprint["precision"] == "fp32" else self.threshold


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """Makes the score table of a shard, and right after it the tar of the kept samples, where a task for that is given.

    Attributes:
        url: The shard.
        table: Where its scores go.
        fingerprint: What they depend on beside the shard.
        rechecked_at: What the table says of the threshold; see ``ScoreMetadata``.
        copy: Makes the tar; None where nothing is copied, or nothing before all shards are scored.
    """

    url: str
    table: AnyPath
    fingerprint: Fingerprint
    rechecked_at: float | None
    copy: CopyTask | None

    @property
    def mark(self) -> AnyPath:
        """See ``Task``. A table is its own mark when nothing is copied."""
        return self.table if self.copy is None else self.copy.mark

    @property
    def tar(self) -> AnyPath | None:
        """See ``Task``."""
        return None if self.copy is None else self.copy.tar

    def committed(self) -> ShardStats | None:
        """See ``Task``."""
        if self.copy is not None:
            return self.copy.committed()
        scores = self._read_table()
        return None if scores is None else _stats_of(scores)

    def copy_left(self) -> CopyTask | None:
        """The task that makes the tar, if a run that was killed has left the table that it takes.

        A table that is damaged or of another run counts as none: the shard is scored again, and the table replaced.
        """
        try:
            return None if self.copy is None or self._read_table() is None else self.copy
        except (ValueError, ShardError):
            return None

    def _read_table(self) -> ShardScores | None:
        """The table that an earlier run has left; None when there is none, or this run would make another one.

        Raises:
            ValueError: When it was made with another model, other settings or from another shard.
            ShardError: When the shard can't be reached.
        """
        if not self.table.is_file():
            return None
        scores = ShardScores.read(self.table)
        found = scores.metadata
        check_fingerprint(found.fingerprint, self.fingerprint, repr(str(self.table)), CURE)
        check_source(self.table, found.shard, self.url)
        is_alike = found.rechecked_at == self.rechecked_at and found.num_bytes == shard_num_bytes(self.url)
        return scores if is_alike else None

    def commit(self, scores: ShardScores) -> ShardStats:
        """Write the table, then the tar; when this returns, they are on disk and whole.

        Raises:
            ShardError: When the shard can't be read again or has changed.
        """
        with publish(self.table) as file:
            scores.write(file)
        return _stats_of(scores) if self.copy is None else self.copy()


def _stats_of(scores: ShardScores) -> ShardStats:
    return shard_stats(select(scores, threshold=None).stats, scores)


def measured_recheck(scorer: ClipScorer, options: ScoringOptions) -> Recheck:
    """What scores shards, its error measured on the first samples of ``options.measured_on``."""
    recheck = Recheck(scorer, options.threshold)
    dataset = _dataset(options.measured_on, scorer, options, batch_size=NUM_MEASURED)
    # One worker gives the blocks in order; none of them is decoded here, where it could kill the run.
    num_workers = 0 if options.num_workers == 0 else 1
    with closing(read_blocks(dataset, num_workers=num_workers, worker_timeout=options.worker_timeout)) as blocks:
        for block in islice(blocks, 0 if recheck.is_measured else MAX_MEASURED_BLOCKS):
            recheck.measure(*block.item.prepared.inputs)
            if recheck.is_measured:
                break
    return recheck


def score_shards(
    urls: Sequence[str],
    recheck: Recheck,
    options: ScoringOptions,
    *,
    on_batch: Callable[[int], None] = lambda num_samples: None,
) -> Generator[tuple[str, ShardScores | ShardError]]:
    """Score shards. The URL of each is yielded when it is complete, with its scores, or why it can't be used.

    The scores of a shard don't depend on the others.

    Memory holds the scores of as many shards as workers are reading, whatever the number of shards.

    Args:
        urls: One shard or many.
        recheck: The model.
        options: How.
        on_batch: Called with the number of samples of each batch.
    """
    scorer = recheck.scorer
    batch_size = options.batch_size or default_batch_size(scorer.device, scorer.fast.width)
    dataset = _dataset(urls, scorer, options, batch_size=batch_size)
    num_workers = default_num_workers(scorer.device) if options.num_workers is None else options.num_workers
    blocks = read_blocks(
        dataset,
        num_workers=num_workers,
        worker_timeout=options.worker_timeout,
        lend=scorer.copies_inputs,
    )
    fingerprint = options.fingerprint(scorer)
    rechecked_at = options.rechecked_at(fingerprint)
    pending: dict[str, _PendingShard] = {}
    with closing(blocks):  # now, and not when the traceback of an interrupt is let go of
        for block, scores in recheck.map(blocks, lambda block: block.item.prepared.inputs, _hold):
            shard = pending.setdefault(block.part.url, _PendingShard(block.part))
            shard.add(block, scores)
            on_batch(len(block.rows))
            if shard.is_complete:
                del pending[block.part.url]
                yield block.part.url, shard.finish(fingerprint, recheck.band, rechecked_at)


def _dataset(urls: Sequence[str], scorer: ClipScorer, options: ScoringOptions, *, batch_size: int) -> BlockDataset:
    return BlockDataset(
        urls=urls,
        preprocess=scorer.preprocess,
        batch_size=batch_size,
        layout=options.layout,
        subset=options.subset,
        interleaved=scorer.copies_inputs,
    )


class _ScoredBlock(NamedTuple):
    """What is left of a block when its pixels are scored."""

    part: ShardPart
    rows: SampleRows
    end: ShardEnd | None
    error: str | None


def _hold(block: Lent[Block], may_be_kept: np.ndarray) -> _ScoredBlock:
    item = block.item
    block.release()
    return _ScoredBlock(item.part, item.prepared.rows, item.end, item.error)


@dataclass
class _PendingShard:
    """What has come of a shard.

    Attributes:
        part: Any of its parts.
        rows: The samples, per block.
        scores: Of the usable ones, per block.
        ends: What each part that was read whole found at the shard's end.
        errors: Per part that could not be read, why.
    """

    part: ShardPart
    rows: list[SampleRows] = field(default_factory=list)
    scores: list[BatchScores] = field(default_factory=list)
    ends: list[ShardEnd] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, block: _ScoredBlock, scores: BatchScores) -> None:
        self.rows.append(block.rows)
        self.scores.append(scores)
        if block.end is not None:
            self.ends.append(block.end)
        if block.error is not None:
            self.errors.append(block.error)

    @property
    def is_complete(self) -> bool:
        return len(self.ends) + len(self.errors) == self.part.num_parts

    def finish(self, fingerprint: Fingerprint, band: float, rechecked_at: float | None) -> ShardScores | ShardError:
        if self.errors:
            return ShardError(self.errors[0])
        if len(set(self.ends)) > 1:
            return ShardError("it changed while it was being read")
        end, url = self.ends[0], public_url(self.part.url)
        rows = SampleRows.concat(self.rows)
        if len(rows) != end.num_samples:
            raise AssertionError(f"{url}: {end.num_samples} samples were read and {len(rows)} arrived")
        metadata = ScoreMetadata(
            shard=url,
            num_bytes=end.num_bytes,
            num_samples=end.num_samples,
            torn=end.torn,
            fingerprint=fingerprint,
            band=band,
            rechecked=sum(batch.num_rechecked for batch in self.scores),
            rechecked_at=rechecked_at,
            members=end.members,
        )
        scores = np.concatenate([batch.scores for batch in self.scores])
        return ShardScores.from_rows(rows, scores, metadata)
