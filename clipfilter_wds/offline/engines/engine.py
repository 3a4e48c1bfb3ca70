"""Defines what an engine does for a run: score shards, and copy from shards that have been scored."""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from clipfilter_wds.offline.packing import AnyCopyTask
from clipfilter_wds.offline.score_task import ScoreTask
from clipfilter_wds.offline.scoring_options import ScoringOptions
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.types import ShardError

#: The URL of a task with what became of it, or why it failed.
Outcome = tuple[str, ShardStats | ShardError]

#: Those of all tasks, in any order.
Outcomes = Generator[Outcome]


class Engine(Protocol):
    """Does the tasks of a run."""

    def fingerprint(self, options: ScoringOptions) -> Fingerprint:
        """What the scores depend on beside the shards."""

    def score(self, tasks: Sequence[ScoreTask], options: ScoringOptions, on_scored: Callable[[int], None]) -> Outcomes:
        """Score shards and commit each; ``on_scored`` is called with numbers of samples as they are scored."""

    def copy(self, tasks: Sequence[AnyCopyTask], num_workers: int | None) -> Outcomes:
        """Copy what is kept of shards that have been scored, ``num_workers`` at a time; None is as many as suit."""
