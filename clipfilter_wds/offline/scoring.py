"""Scores shards. All that is needed is passed in, so that any process can do it."""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from itertools import islice

import numpy as np
import torch

from clipfilter_wds.models.batch_size import default_batch_size
from clipfilter_wds.models.recheck import NUM_MEASURED, Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.blocks import Block, BlockDataset, read_blocks
from clipfilter_wds.offline.pending import PendingShard, ScoredBlock, ScoredShard
from clipfilter_wds.offline.scoring_options import MAX_MEASURED_BLOCKS, ScoringOptions
from clipfilter_wds.scores.metadata import DTYPES
from clipfilter_wds.types import ShardError
from clipfilter_wds.workers.cpus import default_num_workers
from clipfilter_wds.workers.transport import Lent


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
