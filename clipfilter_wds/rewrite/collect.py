"""Batches of many shards, in any order -> the scores of one whole shard after another."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from clipfilter_wds.dataset import SampleRow
from clipfilter_wds.rewrite.blocks import Block
from clipfilter_wds.scorer import ClipScorer
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
    scorer: ClipScorer,
    fingerprint: Fingerprint,
    on_batch: Callable[[int], None],
) -> Iterator[tuple[str, ShardScores] | FailedShard]:
    """Score batches and yield each shard with its URL when all its parts have ended.

    Memory holds the scores of as many shards as workers are reading, whatever the number of shards.

    Args:
        batches: From :class:`~clipfilter_wds.rewrite.blocks.BlockDataset`, of any number of workers.
        scorer: Scores them.
        fingerprint: Goes into each table.
        on_batch: Called with the number of samples of each batch.
    """
    pending: dict[str, _PendingShard] = {}
    for batch in batches:
        shard = pending.setdefault(batch.part.url, _PendingShard(batch.part))
        shard.add(batch, scorer(batch.pixel_values, batch.input_ids))
        on_batch(len(batch.rows))
        if shard.is_complete:
            del pending[batch.part.url]
            yield shard.finish(fingerprint)


@dataclass
class _PendingShard:
    part: ShardPart
    rows: list[SampleRow] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    ends: list[ShardEnd] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, batch: Block, scores: torch.Tensor) -> None:
        self.rows += batch.rows
        self.scores.append(scores)  # stays on the device: one copy per shard instead of one wait per batch
        if batch.end is not None:
            self.ends.append(batch.end)
        if batch.error is not None:
            self.errors.append(batch.error)

    @property
    def is_complete(self) -> bool:
        return len(self.ends) + len(self.errors) == self.part.num_parts

    def finish(self, fingerprint: Fingerprint) -> tuple[str, ShardScores] | FailedShard:
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
            torch.cat(self.scores).cpu().numpy(),
            source=public_url(url),
            num_bytes=end.num_bytes,
            torn=end.torn,
            fingerprint=fingerprint,
        )
