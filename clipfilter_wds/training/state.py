"""Holds where a loader is, as its state."""

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, Self

from clipfilter_wds.training.scoring import Scored
from clipfilter_wds.training.stream import Position
from clipfilter_wds.types import DropReason, FilterStats


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the stream is: per worker its position, whose batch comes next, and the counts so far."""

    positions: tuple[Position, ...]
    next_worker: int = 0
    stats: FilterStats = field(default_factory=FilterStats)

    @property
    def epoch(self) -> int:
        """The epoch that the worker furthest behind is in."""
        return min(position.epoch for position in self.positions)

    def advance(self, scored: Scored, counts: FilterStats) -> Self:
        """The progress after a scoring batch, of which so many samples were seen, kept and dropped."""
        positions = list(self.positions)
        positions[scored.worker] = scored.after
        return type(self)(
            positions=tuple(positions),
            next_worker=(scored.worker + 1) % len(positions),
            stats=self.stats + counts,
        )


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """A point between two training batches.

    Attributes:
        progress: Before the scoring batch that holds the first kept pair not handed out.
        epoch: The epoch that the iteration began in.
        handed: How many kept pairs of that scoring batch were handed out.
        batches: Training batches handed out in this epoch.
    """

    progress: Progress
    epoch: int
    handed: int = 0
    batches: int = 0

    @classmethod
    def start(cls, num_positions: int, epoch: int, stats: FilterStats | None = None) -> Self:
        """The beginning of an epoch."""
        progress = Progress(positions=(Position(epoch=epoch),) * num_positions, stats=stats or FilterStats())
        return cls(progress=progress, epoch=epoch)

    def is_same_place(self, other: Self) -> bool:
        """Whether the stream continues alike from both, whatever was counted before."""
        return (self.epoch, self.progress.positions, self.progress.next_worker) == (
            other.epoch,
            other.progress.positions,
            other.progress.next_worker,
        )

    def to_json(self) -> dict[str, Any]:
        """Positions and counts, as JSON has them."""
        stats = self.progress.stats
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "handed": self.handed,
            "next_worker": self.progress.next_worker,
            "positions": [list(astuple(position)) for position in self.progress.positions],
            # Plain strings, so that a checkpoint loads with weights_only=True.
            "stats": {**asdict(stats), "dropped": {reason.value: count for reason, count in stats.dropped.items()}},
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """From :meth:`to_json`."""
        stats = state["stats"]
        dropped = {DropReason(reason): count for reason, count in stats["dropped"].items()}
        progress = Progress(
            positions=tuple(Position(*position) for position in state["positions"]),
            next_worker=state["next_worker"],
            stats=FilterStats(seen=stats["seen"], kept=stats["kept"], dropped=dropped),
        )
        return cls(progress=progress, epoch=state["epoch"], handed=state["handed"], batches=state["batches"])
