"""The run: which shards are left to do, do them, sum up."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from clipfilter_wds import __version__
from clipfilter_wds.dataset import worker_loader
from clipfilter_wds.rewrite.blocks import BlockDataset
from clipfilter_wds.rewrite.collect import FailedShard, collect_shards
from clipfilter_wds.rewrite.config import ScoreConfig
from clipfilter_wds.rewrite.outputs import Output, ShardStats
from clipfilter_wds.scorer import ClipScorer
from clipfilter_wds.scores import Fingerprint
from clipfilter_wds.shards import public_url
from clipfilter_wds.types import FilterStats, ShardError
from clipfilter_wds.writer import publish_json, remove_leftovers

#: Scored shards that may wait for the disk before scoring waits for them.
_MAX_WAITING_SHARDS = 2


@dataclass(kw_only=True)
class Tally:
    """How far a run is, and how it went.

    Attributes:
        num_shards: How many the run has.
        done: Shards whose outcome is on disk, those of earlier runs included.
        resumed: How many of these an earlier run had committed.
        num_scored: Samples that this run has read and scored, those of unfinished shards included.
        counts: Of the shards that are done.
        torn: How many of these are damaged or cut.
        truncated_captions: How many of their captions were longer than the text tower takes.
        failed: Per shard that could not be used, why.
        seconds: Time since scoring began.
    """

    num_shards: int
    done: int = 0
    resumed: int = 0
    num_scored: int = 0
    counts: FilterStats = field(default_factory=FilterStats)
    torn: int = 0
    truncated_captions: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Time since scoring began."""
        return time.perf_counter() - self.started

    def add(self, stats: ShardStats) -> None:
        """Count a shard as done."""
        self.done += 1
        self.counts += stats.counts
        self.torn += stats.torn
        self.truncated_captions += stats.truncated_captions

    def fail(self, url: str, why: str) -> None:
        """Count a shard as failed."""
        self.failed[public_url(url)] = why


def process_shards(
    config: ScoreConfig, scorer: ClipScorer, *, on_progress: Callable[[Tally], None] = lambda tally: None
) -> Tally:
    """Score the shards and write their outcome, going on where an earlier run of the same settings stopped.

    Args:
        config: A :class:`ScoreConfig` for score tables, a ``RewriteConfig`` for shards of the kept samples as well.
        scorer: The model.
        on_progress: Called after every batch and shard.

    Returns:
        The totals, which are also in ``summary.json``. Shards that could not be used are in ``failed``; the others are
        complete.

    Raises:
        ValueError: When the output folder was begun with other settings.
        OSError: When the output can't be written.
    """
    fingerprint = {**scorer.fingerprint, "caption": config.caption, "max_member_bytes": config.layout.max_member_bytes}
    output = config.open_output()
    remove_leftovers(config.folder)
    tally = Tally(num_shards=len(config.urls))
    left = list(_not_committed(config.urls, output, fingerprint, tally))
    on_progress(tally)
    if left:
        _score_and_commit(left, config, scorer, fingerprint, output, tally, on_progress)
    output.finish()
    publish_json(config.folder / "summary.json", _summary(tally, scorer, config))
    return tally


def _not_committed(urls: list[str], output: Output, fingerprint: Fingerprint, tally: Tally) -> Iterator[str]:
    for url in urls:
        try:
            stats = output.committed(url, fingerprint)
        except ShardError as error:
            tally.fail(url, str(error))
            continue
        if stats is None:
            yield url
        else:
            tally.resumed += 1
            tally.add(stats)


def _score_and_commit(
    urls: list[str],
    config: ScoreConfig,
    scorer: ClipScorer,
    fingerprint: Fingerprint,
    output: Output,
    tally: Tally,
    on_progress: Callable[[Tally], None],
) -> None:
    dataset = BlockDataset(urls, scorer.preprocess, batch_size=config.batch_size, layout=config.layout)
    num_workers = default_num_workers(scorer.device) if config.num_workers is None else config.num_workers
    loader = worker_loader(dataset, num_workers=num_workers, pin_memory=scorer.device.type == "cuda", in_order=False)

    def on_batch(num_samples: int) -> None:
        tally.num_scored += num_samples
        on_progress(tally)

    # One thread writes while this one scores, so that neither waits for the other.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="clipfilter-writer") as writer:
        waiting: deque[tuple[str, Future[ShardStats]]] = deque()
        for shard in collect_shards(loader, scorer, fingerprint, on_batch):
            if isinstance(shard, FailedShard):
                tally.fail(shard.url, shard.why)
            else:
                url, scores = shard
                waiting.append((url, writer.submit(output.commit, url, scores)))
            while len(waiting) > _MAX_WAITING_SHARDS or (waiting and waiting[0][1].done()):
                _settle(*waiting.popleft(), tally)
            on_progress(tally)
        while waiting:
            _settle(*waiting.popleft(), tally)
            on_progress(tally)


def _settle(url: str, commit: "Future[ShardStats]", tally: Tally) -> None:
    try:
        tally.add(commit.result())
    except ShardError as error:
        tally.fail(url, str(error))


def default_num_workers(device: torch.device) -> int:
    """Decoding processes that suit a device: all processors for a GPU, half of them when they also run the model."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, available if device.type == "cuda" else available // 2)


def _summary(tally: Tally, scorer: ClipScorer, config: ScoreConfig) -> dict[str, Any]:
    return {
        "seen": tally.counts.seen,
        "kept": tally.counts.kept,
        "dropped": dict(tally.counts.dropped),
        "shards": tally.num_shards,
        "failed_shards": tally.failed,
        "torn_shards": tally.torn,
        "resumed_shards": tally.resumed,
        "model": scorer.model_name,
        "threshold": getattr(config, "threshold", None),
        "precision": scorer.precision,
        "band": 0.0,
        "rechecked": 0,
        "truncated_captions": tally.truncated_captions,
        "scored": tally.num_scored,
        "samples_per_second": round(tally.num_scored / tally.seconds, 1),
        "seconds": round(tally.seconds, 3),
        "version": __version__,
    }
