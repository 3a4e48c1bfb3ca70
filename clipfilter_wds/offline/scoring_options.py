"""Holds how shards are scored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.pending import ScoredBy
from clipfilter_wds.preprocess.json_columns import JsonColumns
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.metadata import DTYPES, Embeddings
from clipfilter_wds.scores.selection import Choice
from clipfilter_wds.scores.subset import Subset
from clipfilter_wds.shards.samples import SampleLayout

if TYPE_CHECKING:
    from clipfilter_wds.models.scorer import ClipScorer

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

    def fingerprint(self, scorer: "ClipScorer") -> Fingerprint:
        """What the scores depend on beside the shards."""
        return {
            **scorer.fingerprint,
            **self.layout.fingerprint,
            **({} if self.subset is None else {"subset": self.subset.digest}),
            **({} if self.limit is None else {"limit": self.limit}),
        }

    def scored_by(self, scorer: "ClipScorer", batch_size: int) -> ScoredBy:
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
