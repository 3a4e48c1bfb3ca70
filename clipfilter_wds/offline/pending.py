"""Collects the blocks of a shard that have been scored, until all of it is there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from clipfilter_wds.preprocess.json_columns import JsonValue
from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.embeddings import ShardEmbeddings
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.split import ShardPart
from clipfilter_wds.types import ShardEnd, ShardError

if TYPE_CHECKING:
    from clipfilter_wds.models.recheck import BatchScores
    from clipfilter_wds.offline.blocks import Block


class ScoredBlock(NamedTuple):
    """What is left of a block when its pixels are scored."""

    part: ShardPart
    rows: SampleRows
    columns: Sequence[tuple[JsonValue, ...]]
    end: ShardEnd | None
    error: str | None

    @classmethod
    def of(cls, block: "Block") -> Self:
        """Leave the pixels behind."""
        return cls(block.part, block.prepared.rows, block.columns, block.end, block.error)


class ScoredShard(NamedTuple):
    """The scores of a shard, and its embeddings where they are to be saved."""

    scores: ShardScores
    embeddings: ShardEmbeddings | None = None


@dataclass(frozen=True, kw_only=True)
class ScoredBy:
    """What the tables of a run say of how it scores.

    Attributes:
        fingerprint: What the scores depend on beside the shards.
        rechecked_at: See ``ScoreMetadata``.
        batch_size: Likewise.
        embeddings: Likewise.
        columns: Likewise.
    """

    fingerprint: Fingerprint
    rechecked_at: float | None
    batch_size: int
    embeddings: Mapping[str, Any] | None
    columns: tuple[str, ...]


@dataclass
class PendingShard:
    """What has come of a shard.

    Attributes:
        part: Any of its parts.
        rows: The samples, per block.
        columns: Of each sample, the values of further columns.
        scores: Of the usable ones, per block.
        ends: What each part that was read whole found at the shard's end.
        errors: Per part that could not be read, why.
    """

    part: ShardPart
    rows: list[SampleRows] = field(default_factory=list)
    columns: list[tuple[JsonValue, ...]] = field(default_factory=list)
    scores: "list[BatchScores]" = field(default_factory=list)
    ends: list[ShardEnd] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, block: ScoredBlock, scores: "BatchScores") -> None:
        """Take in a block with its scores."""
        self.rows.append(block.rows)
        self.columns += block.columns
        self.scores.append(scores)
        if block.end is not None:
            self.ends.append(block.end)
        if block.error is not None:
            self.errors.append(block.error)

    @property
    def is_complete(self) -> bool:
        """Whether all parts have ended."""
        return len(self.ends) + len(self.errors) == self.part.num_parts

    def finish(self, by: ScoredBy, band: float) -> ScoredShard | ShardError:
        """The scores of the shard, or why it can't be used."""
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
            **end.identity._asdict(),
            num_samples=end.num_samples,
            torn=end.torn,
            fingerprint=by.fingerprint,
            band=band,
            rechecked=sum(batch.num_rechecked for batch in self.scores),
            rechecked_at=by.rechecked_at,
            members=end.members,
            batch_size=by.batch_size,
            embeddings=by.embeddings,
            columns=by.columns,
        )
        cosines = np.concatenate([batch.scores for batch in self.scores])
        scores = ShardScores.from_rows(rows, cosines, metadata, self.columns)
        return ScoredShard(scores, None if by.embeddings is None else self._embeddings(rows, scores, by.embeddings))

    def _embeddings(self, rows: SampleRows, scores: ShardScores, saved: Mapping[str, Any]) -> ShardEmbeddings:
        nothing = np.empty((2, 0, saved["dim"]), dtype=saved["dtype"])
        found = [batch.embeddings for batch in self.scores if batch.embeddings is not None and len(batch.scores)]
        embeddings = np.concatenate([nothing, *found], axis=1)
        indices = rows.numbers["index"][rows.usable]
        has_score = scores.usable[indices]
        return ShardEmbeddings.from_rows(embeddings[:, has_score], indices[has_score], len(rows))
