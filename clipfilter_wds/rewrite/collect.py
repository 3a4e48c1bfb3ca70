"""Batches of many shards, in any order -> the scores of one whole shard after another."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from clipfilter_wds.dataset import SampleRow
from clipfilter_wds.recheck import BatchScores, Recheck
from clipfilter_wds.rewrite.blocks import Block
from clipfilter_wds.scores import Fingerprint, ShardScores
from clipfilter_wds.shards import ShardPart, public_url
from clipfilter_wds.types import ShardEnd


@dataclass(frozen=True, kw_only=True)
class FailedShard:
    """A shard that can't be used, and why."""

    url: str
    why: str


def collect_shards(
    batches: Iterable[Block],
    recheck: Recheck,
    fingerprint: Fingerprint,
    on_batch: Callable[[int], None],
) -> Iterator[tuple[str, ShardScores] | FailedShard]:
    """Score batches and yield each shard with its URL when all its parts have ended.

    Memory holds the scores of as many shards as workers are reading, whatever the number of shards.

    Args:
        batches: From :class:`~clipfilter_wds.rewrite.blocks.BlockDataset`, of any number of workers.
        recheck: Scores them.
        fingerprint: Goes into each table.
        on_batch: Called with the number of samples of each batch.
    """
    pending: dict[str, _PendingShard] = {}
    for batch, scored in recheck.map(batches, lambda batch: (batch.pixel_values, batch.input_ids)):
        shard = pending.setdefault(batch.part.url, _PendingShard(batch.part))
        shard.add(batch, scored)
        on_batch(len(batch.rows))
        if shard.is_complete:
            del pending[batch.part.url]
            yield shard.finish(fingerprint, recheck.band)


@dataclass
class _PendingShard:
    part: ShardPart
    rows: list[SampleRow] = field(default_factory=list)
    scores: list[BatchScores] = field(default_factory=list)
    ends: list[ShardEnd] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, batch: Block, scores: BatchScores) -> None:
        self.rows += batch.rows
        self.scores.append(scores)
        if batch.end is not None:
            self.ends.append(batch.end)
        if batch.error is not None:
            self.errors.append(batch.error)

    @property
    def is_complete(self) -> bool:
        return len(self.ends) + len(self.errors) == self.part.num_parts

    def finish(self, fingerprint: Fingerprint, band: float) -> tuple[str, ShardScores] | FailedShard:
        url = self.part.url
        if self.errors:
            return FailedShard(url=url, why=self.errors[0])
        if len(set(self.ends)) > 1:
            return FailedShard(url=url, why="it changed while it was being read")
        end = self.ends[0]
        if len(self.rows) != end.num_samples:
            raise AssertionError(f"{url}: {end.num_samples} samples were read and {len(self.rows)} arrived")
        return url, ShardScores.from_rows(
            self.rows,
            np.concatenate([batch.scores for batch in self.scores]),
            source=public_url(url),
            num_bytes=end.num_bytes,
            torn=end.torn,
            fingerprint=fingerprint,
            band=band,
            num_rechecked=sum(batch.num_rechecked for batch in self.scores),
        )
