"""Holds where a loader is, as its state."""

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, Self

from clipfilter_wds.training.scoring import Scored
from clipfilter_wds.training.stream import Position, StreamProgress
from clipfilter_wds.training.topology import Topology
from clipfilter_wds.types import DropReason, FilterStats


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the streams of a rank are.

    Attributes:
        topology: Who reads which stream.
        streams: Per stream of this rank, how far it is.
        next_worker: Whose batch comes next.
        stats: The counts so far.
    """

    topology: Topology
    streams: Mapping[int, StreamProgress]
    next_worker: int = 0
    stats: FilterStats = field(default_factory=FilterStats)

    @classmethod
    def start(cls, topology: Topology, epoch: int, stats: FilterStats | None = None) -> Self:
        """The beginning of an epoch."""
        streams = dict.fromkeys(topology.streams, StreamProgress(Position(epoch=epoch)))
        return cls(topology=topology, streams=streams, stats=stats or FilterStats())

    @property
    def epoch(self) -> int:
        """The epoch that the stream furthest behind is in."""
        return min((stream.position.epoch for stream in self.streams.values()), default=0)

    def advance(self, scored: Scored, counts: FilterStats, *, given: int = 0) -> Self:
        """The progress after a scoring batch.

        Args:
            scored: The batch.
            counts: How many of its samples were seen, kept and dropped.
            given: How many kept samples behind it training was given already.
        """
        return replace(
            self,
            streams={**self.streams, scored.stream: replace(scored.after, given=given)},
            next_worker=(scored.worker + 1) % self.topology.num_workers,
            stats=self.stats + counts,
        )

    def give(self, stream: int, num_samples: int) -> Self:
        """The progress when training is given so many more of a stream's kept samples."""
        progress = self.streams[stream]
        return replace(self, streams={**self.streams, stream: replace(progress, given=progress.given + num_samples)})

    def is_same_place(self, other: Self) -> bool:
        """Whether the streams continue alike from both, whatever was counted before."""
        return replace(self, stats=other.stats) == other


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """A point between two training batches.

    Attributes:
        progress: Before the scoring batch that holds the first kept pair that was not given.
        epoch: The epoch that the iteration began in.
        batches: Training batches that were given in this epoch.
    """

    progress: Progress
    epoch: int
    batches: int = 0

    @property
    def is_beginning(self) -> bool:
        """Whether nothing was read in this epoch yet."""
        start = StreamProgress(Position(epoch=self.epoch))
        return not self.batches and all(stream == start for stream in self.progress.streams.values())

    def to_json(self) -> dict[str, Any]:
        """Positions and counts, as JSON has them."""
        progress = self.progress
        stats = progress.stats
        return {
            "topology": asdict(progress.topology),
            "epoch": self.epoch,
            "batches": self.batches,
            "next_worker": progress.next_worker,
            "streams": {
                str(stream): [*astuple(one.position), one.turns, one.given] for stream, one in progress.streams.items()
            },
            # Plain strings, so that a checkpoint loads with weights_only=True.
            "stats": {**asdict(stats), "dropped": {reason.value: count for reason, count in stats.dropped.items()}},
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """From :meth:`to_json`."""
        stats = state["stats"]
        dropped = {DropReason(reason): count for reason, count in stats["dropped"].items()}
        progress = Progress(
            topology=Topology(**state["topology"]),
            streams={
                int(stream): StreamProgress(Position(*position), turns, given)
                for stream, (*position, turns, given) in state["streams"].items()
            },
            next_worker=state["next_worker"],
            stats=FilterStats(seen=stats["seen"], kept=stats["kept"], dropped=dropped),
        )
        return cls(progress=progress, epoch=state["epoch"], batches=state["batches"])
