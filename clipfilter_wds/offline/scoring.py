"""Scores shards. All that is needed is passed in, so that any process can do it."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Self

import numpy as np
import torch

from clipfilter_wds.models.batch_size import default_batch_size
from clipfilter_wds.models.recheck import NUM_MEASURED, Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.blocks import Block, BlockDataset, read_blocks
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.pending import PendingShard, ScoredBlock, ScoredBy, ScoredShard
from clipfilter_wds.preprocess.json_columns import JsonColumns
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.metadata import DTYPES, Embeddings
from clipfilter_wds.scores.selection import Choice
from clipfilter_wds.scores.subset import Subset
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.types import ShardError
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
        embeddings: Save the embeddings, in this type; None saves none.
        columns: Fields of the json member that the tables hold too; None for none.
        limit: How many samples of the run are scored; None for all.
        first_samples: With a limit, how many of each shard's first samples are scored.
        measured_on: The run's first shards, whose first samples tell how far the scores are off. They are the same for
            every process that scores shards of the run, and when it is resumed, so that all compute the same bits.
    """

    layout: SampleLayout
    batch_size: int | None
    num_workers: int | None
    worker_timeout: float
    threshold: float | None = None
    subset: Subset | None = None
    embeddings: Embeddings | None = None
    columns: JsonColumns | None = None
    limit: int | None = None
    first_samples: Mapping[str, int] = field(default_factory=dict)
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
            embeddings=config.embeddings,
            columns=config.json_columns,
            limit=config.limit,
            first_samples=config.first_samples,
            measured_on=tuple(config.urls[:MAX_MEASURED_BLOCKS]),
        )

    def fingerprint(self, scorer: ClipScorer) -> Fingerprint:
        """What the scores depend on beside the shards."""
        return {
            **scorer.fingerprint,
            **self.layout.fingerprint,
            **({} if self.subset is None else {"subset": self.subset.digest}),
            **({} if self.limit is None else {"limit": self.limit}),
        }

    def scored_by(self, scorer: ClipScorer, batch_size: int) -> ScoredBy:
        """What the tables say of how they were made, so many samples at a time."""
        fingerprint, embeddings = self.fingerprint(scorer), None
        if self.embeddings is not None:
            embeddings = scorer.describe_embeddings(DTYPES[self.embeddings])
        return ScoredBy(
            fingerprint=fingerprint,
            rechecked_at=self.rechecked_at(fingerprint),
            batch_size=batch_size,
            embeddings=embeddings,
            columns=() if self.columns is None else self.columns.sources,
        )

    def rechecked_at(self, fingerprint: Fingerprint) -> float | None:
        """What score tables say of the threshold; None when all scores are in float32."""
        return None if fingerprint["precision"] == "fp32" else self.threshold


def measured_recheck(scorer: ClipScorer, options: ScoringOptions) -> Recheck:
    """What scores shards, its error measured on the first samples of ``options.measured_on``."""
    dtype = None if options.embeddings is None else getattr(torch, DTYPES[options.embeddings])
    recheck = Recheck(scorer, options.threshold, embeddings=dtype)
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
) -> Generator[tuple[str, ScoredShard | ShardError]]:
    """Score shards. The URL of each is yielded when it is complete, with its scores, or why it can't be used.

    The scores of a shard don't depend on the others.

    Memory holds the scores of as many shards as workers are reading, whatever the number of shards; embeddings that are
    to be saved take 4 bytes x dim per sample of these in float16, and 8 in float32, and twice that while they are put
    in order.

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
    by = options.scored_by(scorer, batch_size)
    pending: dict[str, PendingShard] = {}
    with closing(blocks):  # now, and not when the traceback of an interrupt is let go of
        for block, scores in recheck.map(blocks, lambda block: block.item.prepared.inputs, _hold):
            shard = pending.setdefault(block.part.url, PendingShard(block.part))
            shard.add(block, scores)
            on_batch(len(block.rows))
            if shard.is_complete:
                del pending[block.part.url]
                yield block.part.url, shard.finish(by, recheck.band)


def _dataset(urls: Sequence[str], scorer: ClipScorer, options: ScoringOptions, *, batch_size: int) -> BlockDataset:
    return BlockDataset(
        urls=urls,
        preprocess=scorer.preprocess,
        batch_size=batch_size,
        layout=options.layout,
        json_columns=options.columns,
        subset=options.subset,
        first_samples=options.first_samples,
        interleaved=scorer.copies_inputs,
    )


def _hold(block: Lent[Block], may_be_kept: np.ndarray) -> ScoredBlock:
    scored = ScoredBlock.of(block.item)
    block.release()
    return scored
