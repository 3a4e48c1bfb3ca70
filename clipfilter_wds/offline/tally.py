"""Counts what became of the samples of a shard, and of a run."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

from clipfilter_wds.scores.fraction import Cut
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.types import DropReason, FilterStats
from clipfilter_wds.version import __version__


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """What became of one shard, or of several together.

    Attributes:
        counts: The samples that were seen, kept and dropped.
        torn: How many of the shards are damaged or cut.
        truncated_captions: How many captions were longer than the text tower takes.
        band: The widest error band of any shard's scores, 0.0 in float32.
        rechecked: Samples that lay within the band of the threshold and were scored again in float32.
        in_band: Samples whose score was made before, for no threshold or another one, and lies within the band of this
            one: float32 might decide some of them otherwise.
        renamed_keys: Samples whose key got a suffix, since it came before in the output.
        members: What the members are called, and how many are, of shards where most samples lack an image or a caption,
            or there is none; and what links are called, where any lacks one. See ``shards/found.py``.
        null_columns: Per further column of the tables, how many samples the shards hold in all of which it is null.
        torn_names: The first few of the torn shards, sorted.
    """

    counts: FilterStats = field(default_factory=FilterStats)
    torn: int = 0
    truncated_captions: int = 0
    band: float = 0.0
    rechecked: int = 0
    in_band: int = 0
    renamed_keys: int = 0
    members: Mapping[str, int] = field(default_factory=dict)
    null_columns: Mapping[str, int] = field(default_factory=dict)
    torn_names: tuple[str, ...] = ()

    def __add__(self, other: "ShardStats") -> "ShardStats":
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("counts", *_COUNTERS)}
        members = Counter(self.members) + Counter(other.members) if other.members else self.members
        if len(members) > _MAX_NAMES:
            members = dict(Counter(members).most_common(_MAX_NAMES))
        return ShardStats(
            **{**sums, "band": max(self.band, other.band)},
            members=members,
            null_columns=dict(Counter(self.null_columns) + Counter(other.null_columns)),
            torn_names=tuple(sorted({*self.torn_names, *other.torn_names})[:_MAX_TORN_NAMES]),
        )

    def to_record(self) -> dict[str, Any]:
        """As commit marks and summaries name it. JSON-ready."""
        counts = self.counts
        counted = {"seen": counts.seen, "kept": counts.kept, "dropped": dict(counts.dropped)}
        found = {
            "members": dict(self.members),
            "null_columns": dict(self.null_columns),
            "torn_names": list(self.torn_names),
        }
        counters = {name: getattr(self, name) for name in _COUNTERS}
        return {**counted, **counters, **{name: value for name, value in found.items() if value}}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """What :meth:`to_record` made, also as a part of more."""
        dropped = {DropReason(reason): count for reason, count in record["dropped"].items()}
        counts = FilterStats(seen=record["seen"], kept=record["kept"], dropped=dropped)
        return cls(
            counts=counts,
            **{name: record[name] for name in _COUNTERS},
            members=record.get("members", {}),
            null_columns=record.get("null_columns", {}),
            torn_names=tuple(record.get("torn_names", ())),
        )

    @property
    def num_lacking(self) -> int:
        """How many samples lack an image or a caption."""
        return sum(self.counts.dropped.get(reason, 0) for reason in _LACKING)

    @property
    def is_lacking(self) -> bool:
        """Whether nearly all samples lack one: over nine of ten whose members were looked at."""
        num_unread = sum(self.counts.dropped.get(reason, 0) for reason in _UNREAD)
        return self.num_lacking > 0.9 * (self.counts.seen - num_unread)


#: Entries of a record that are named as the attributes are.
_NO_COUNTERS = ("counts", "members", "null_columns", "torn_names")
_COUNTERS = [field.name for field in fields(ShardStats) if field.name not in _NO_COUNTERS]
#: Why a sample lacks an image or a caption, and why nobody knows whether it does.
_LACKING = (DropReason.MISSING_IMAGE, DropReason.MISSING_CAPTION)
_UNREAD = (DropReason.TORN, DropReason.MEMBER_TOO_LARGE, DropReason.NOT_IN_SUBSET, DropReason.DECODER_CRASH)
#: Samples of a shard where none is done yet: what img2dataset writes.
_USUAL_SHARD = 10_000
#: So many torn shards are named.
_MAX_TORN_NAMES = 10
#: Of so many names, the most frequent are kept.
_MAX_NAMES = 64


class Phase(StrEnum):
    """What a run is doing."""

    SCORING = "scoring"
    COPYING = "copying"
    RESCORING = "rescoring"
    WAITING = "waiting for the other ranks"


@dataclass(kw_only=True)
class Tally:
    """How far a run is, and how it went.

    Attributes:
        num_shards: How many the run has.
        phase: What is being done to them; ``COPYING`` when all of them have been scored before.
        done: Shards whose outcome is on disk, those of earlier runs included.
        resumed: How many of these an earlier run had committed.
        num_resumed: Samples of the shards that an earlier run had committed.
        num_scored: Samples that this run has read and scored, those of unfinished shards included.
        num_copied: Samples of the shards that this run has copied from without scoring them, dropped ones included.
        stats: Of the shards that are done.
        lacking: Of those among them in which nearly all samples lack an image or a caption.
        num_lacking_shards: How many these are.
        failed: Per shard that could not be used, why.
        missing: Shards that are named and not there, and left out.
        cut: Where the scores that are kept end, when a fraction of them is.
        started: When the run began, in seconds of ``time.perf_counter``.
    """

    num_shards: int
    phase: Phase = Phase.SCORING
    done: int = 0
    resumed: int = 0
    num_resumed: int = 0
    num_scored: int = 0
    num_copied: int = 0
    stats: ShardStats = field(default_factory=ShardStats)
    lacking: ShardStats = field(default_factory=ShardStats)
    num_lacking_shards: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    cut: Cut | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def counts(self) -> FilterStats:
        """The samples of the shards that are done."""
        return self.stats.counts

    @property
    def seconds(self) -> float:
        """Time since the run began."""
        return time.perf_counter() - self.started

    @property
    def samples_per_second(self) -> float:
        """Pace of the run."""
        return (self.num_scored or self.num_copied) / max(self.seconds, 1e-9)

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1: shards, and of unfinished ones what their samples are of the others'."""
        finished = self.done + len(self.failed)
        if finished >= self.num_shards:
            return 1.0
        num_begun = max(self.num_scored - (self.counts.seen - self.num_resumed), 0)
        per_shard = self.counts.seen / self.done if self.counts.seen else _USUAL_SHARD
        left = self.num_shards - finished
        return (finished + min(num_begun / per_shard, 0.95 * left)) / self.num_shards

    def add(self, stats: ShardStats) -> None:
        """Count a shard as done."""
        self.done += 1
        self.stats += stats
        if stats.is_lacking:
            self.lacking += stats
            self.num_lacking_shards += 1

    def fail(self, url: str, why: str) -> None:
        """Count a shard as failed."""
        self.failed[public_url(url)] = why

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` says of the run's course."""
        counted = self.stats.to_record()
        return {
            **{name: counted.pop(name) for name in ("seen", "kept", "dropped")},
            "shards": self.num_shards,
            "failed_shards": self.failed,
            "torn_shards": counted.pop("torn"),
            "resumed_shards": self.resumed,
            **counted,
            **({} if self.cut is None else {"cut": self.cut.score, "cut_ties_dropped": self.cut.num_ties_dropped}),
            "scored": self.num_scored,
            "samples_per_second": round(self.samples_per_second, 1),
            "seconds": round(self.seconds, 3),
            "version": __version__,
        }


#: Called with a run's tally whenever there is something new.
OnProgress = Callable[[Tally], None]
