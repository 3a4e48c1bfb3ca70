"""How a run goes: the outcome of one shard, the running total, the summary."""

import time
from dataclasses import dataclass, field
from typing import Any

from clipfilter_wds.shards.names import public_url
from clipfilter_wds.types import FilterStats
from clipfilter_wds.version import __version__


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """The outcome of one shard, or of the shards that end in a packed one; :class:`Tally` says what the numbers are."""

    counts: FilterStats
    torn: int
    truncated_captions: int
    band: float
    rechecked: int
    in_band: int = 0
    renamed: int = 0


@dataclass(kw_only=True)
class Tally:
    """How far a run is, and how it went.

    Attributes:
        num_shards: How many the run has.
        phase: What is being done to them: ``scoring``, or ``copying`` when they have been scored before.
        done: Shards whose outcome is on disk, those of earlier runs included.
        resumed: How many of these an earlier run had committed.
        num_scored: Samples that this run has read and scored, those of unfinished shards included.
        num_copied: Samples of the shards that this run has copied from, those that were not kept included.
        counts: Of the shards that are done.
        torn: How many of these are damaged or cut.
        truncated_captions: How many of their captions were longer than the text tower takes.
        band: The widest error band of any shard's scores, 0.0 in float32.
        rechecked: Samples that lay within the band of the threshold and were scored again in float32.
        in_band: Samples that were decided by scores made before, which lie within their band of the threshold: scored
            in float32, some might be decided otherwise.
        renamed: Samples whose key got a suffix, since it came before in the output.
        failed: Per shard that could not be used, why.
        seconds: Time since the phase began.
    """

    num_shards: int
    phase: str = "scoring"
    done: int = 0
    resumed: int = 0
    num_scored: int = 0
    num_copied: int = 0
    counts: FilterStats = field(default_factory=FilterStats)
    torn: int = 0
    truncated_captions: int = 0
    band: float = 0.0
    rechecked: int = 0
    in_band: int = 0
    renamed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Time since the phase began."""
        return time.perf_counter() - self.started

    @property
    def samples_per_second(self) -> float:
        """Pace of the phase."""
        return (self.num_scored or self.num_copied) / max(self.seconds, 1e-9)

    def add(self, stats: ShardStats) -> None:
        """Count a shard as done."""
        self.done += 1
        self.counts += stats.counts
        self.torn += stats.torn
        self.truncated_captions += stats.truncated_captions
        self.band = max(self.band, stats.band)
        self.rechecked += stats.rechecked
        self.in_band += stats.in_band
        self.renamed += stats.renamed

    def fail(self, url: str, why: str) -> None:
        """Count a shard as failed."""
        self.failed[public_url(url)] = why

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` tells of the run's course."""
        return {
            "seen": self.counts.seen,
            "kept": self.counts.kept,
            "dropped": dict(self.counts.dropped),
            "shards": self.num_shards,
            "failed_shards": self.failed,
            "torn_shards": self.torn,
            "resumed_shards": self.resumed,
            "truncated_captions": self.truncated_captions,
            "band": self.band,
            "rechecked": self.rechecked,
            "in_band": self.in_band,
            "renamed_keys": self.renamed,
            "scored": self.num_scored,
            "samples_per_second": round(self.samples_per_second, 1),
            "seconds": round(self.seconds, 3),
            "version": __version__,
        }
