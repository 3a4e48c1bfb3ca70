"""Shards -> their scores. Everything that it takes is passed in, so that it can be done anywhere."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch

from clipfilter_wds.recheck import NUM_MEASURED, Recheck
from clipfilter_wds.rewrite.blocks import BlockDataset, read_blocks
from clipfilter_wds.rewrite.collect import FailedShard, collect_shards
from clipfilter_wds.samples import SampleLayout
from clipfilter_wds.scorer import ClipScorer
from clipfilter_wds.scores import Fingerprint, ShardScores
from clipfilter_wds.subset import Subset

#: Blocks that are looked through for usable samples to measure the error of the scores on.
MAX_MEASURED_BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How shards are scored. Picklable.

    Attributes:
        layout: Where image and caption are.
        batch_size: Samples per forward pass.
        num_workers: Processes that decode; None chooses by device and number of processors.
        threshold: Scores near it are computed in float32.
        worker_timeout: Seconds that one sample may take to decode; 0 is for ever.
        subset: Decode and score only the samples that are listed.
        measured_on: The run's first shards, whose first samples tell how far the scores are off. They are the same for
            all who do shards of the run, now or when it goes on, so that all compute the same bits.
    """

    layout: SampleLayout
    batch_size: int
    num_workers: int | None
    worker_timeout: float
    threshold: float | None = None
    subset: Subset | None = None
    measured_on: tuple[str, ...] = ()

    def fingerprint(self, scorer: ClipScorer) -> Fingerprint:
        """What the scores depend on beside the shards."""
        return {
            **scorer.fingerprint,
            **self.layout.fingerprint,
            **({} if self.subset is None else {"subset": self.subset.digest}),
        }


def measured_recheck(scorer: ClipScorer, options: ScoringOptions) -> Recheck:
    """What scores shards, its error measured on the first samples of ``options.measured_on``."""
    recheck = Recheck(scorer, options.threshold)
    dataset = BlockDataset(
        options.measured_on,
        scorer.preprocess,
        batch_size=NUM_MEASURED,
        layout=options.layout,
        subset=options.subset,
    )
    # One worker gives the blocks in order; none of them is decoded here, where it could kill the run.
    num_workers = 0 if options.num_workers == 0 else 1
    with closing(read_blocks(dataset, num_workers=num_workers, worker_timeout=options.worker_timeout)) as blocks:
        for block in islice(blocks, 0 if recheck.is_measured else MAX_MEASURED_BLOCKS):
            recheck.measure(block.pixel_values, block.input_ids)
            if recheck.is_measured:
                break
    return recheck


def score_shards(
    urls: Sequence[str],
    recheck: Recheck,
    options: ScoringOptions,
    *,
    on_batch: Callable[[int], None] = lambda num_samples: None,
) -> Generator[tuple[str, ShardScores] | FailedShard]:
    """Score shards; each is yielded when it is complete. The scores of a shard don't depend on the others.

    Args:
        urls: One shard or many.
        recheck: The model.
        options: How.
        on_batch: Called with the number of samples of each batch.
    """
    scorer = recheck.scorer
    dataset = BlockDataset(
        urls, scorer.preprocess, batch_size=options.batch_size, layout=options.layout, subset=options.subset
    )
    num_workers = default_num_workers(scorer.device) if options.num_workers is None else options.num_workers
    blocks = read_blocks(
        dataset,
        num_workers=num_workers,
        worker_timeout=options.worker_timeout,
        pin_memory=scorer.device.type == "cuda",
    )
    with closing(blocks):  # now, and not when the traceback of an interrupt is let go of
        yield from collect_shards(blocks, recheck, options.fingerprint(scorer), on_batch)


def default_num_workers(device: torch.device) -> int:
    """Decoding processes that suit a device: all processors for a GPU, half of them when they also run the model."""
    available = num_processors()
    return max(1, available if device.type == "cuda" else available // 2)


def num_processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
