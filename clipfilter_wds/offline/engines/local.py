"""Does the shards of a run in this process and its workers."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from clipfilter_wds.offline.engines.engine import Outcome, Outcomes
from clipfilter_wds.offline.packing import AnyCopyTask
from clipfilter_wds.offline.score_task import ScoreTask
from clipfilter_wds.offline.scoring_options import ScoringOptions
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.types import ShardError
from clipfilter_wds.workers.cpus import default_num_workers, num_cpus
from clipfilter_wds.workers.tasks import TaskProcesses

if TYPE_CHECKING:
    from clipfilter_wds.models.recheck import Recheck
    from clipfilter_wds.models.scorer import ClipScorer

#: Scored shards that may wait for a process that writes them before scoring waits for them.
_MAX_WAITING_SHARDS = 2

#: Processes that write scored shards, at most. A disk is written fast enough by one; other storages are slow to answer.
_MOST_WRITERS = 4


class LocalEngine:
    """Does the shards in this process and its workers.

    Args:
        scorer: The model; None when there is nothing to score.
        share: How many processes like this one share the machine's CPUs.
    """

    def __init__(self, scorer: "ClipScorer | None", share: int = 1) -> None:
        self._scorer, self._share = scorer, share
        self._measured: tuple[object, Recheck] | None = None

    @property
    def scorer(self) -> "ClipScorer":
        """The model.

        Raises:
            ValueError: When there is none.
        """
        if self._scorer is None:
            raise ValueError("scorer is None; without score tables there must be a model")
        return self._scorer

    def fingerprint(self, options: ScoringOptions) -> Fingerprint:
        """See ``Engine``."""
        return options.fingerprint(self.scorer)

    def score(self, tasks: Sequence[ScoreTask], options: ScoringOptions, on_scored: Callable[[int], None]) -> Outcomes:
        """See ``Engine``. Other processes commit while this one scores, so that neither waits for the other."""
        from clipfilter_wds.offline.scoring import score_shards

        if options.num_workers is None:
            num_workers = max(1, default_num_workers(self.scorer.device) // self._share)
            options = replace(options, num_workers=num_workers)
        by_url = {task.url: task for task in tasks}
        waiting: deque[tuple[str, Future[ShardStats]]] = deque()
        num_writers = max(1, min(len(tasks), num_cpus() // self._share, _MOST_WRITERS))
        with TaskProcesses(num_writers) as writers:
            recheck = self._measured_recheck(options)
            with closing(score_shards(list(by_url), recheck, options, on_batch=on_scored)) as shards:
                for url, scores in shards:
                    if isinstance(scores, ShardError):
                        yield url, scores
                    else:
                        waiting.append((url, writers.submit(by_url[url].commit, scores)))
                    while len(waiting) > num_writers + _MAX_WAITING_SHARDS or (waiting and waiting[0][1].done()):
                        yield _outcome(writers, *waiting.popleft())
            while waiting:
                yield _outcome(writers, *waiting.popleft())

    def _measured_recheck(self, options: ScoringOptions) -> "Recheck":
        """The same one as long as it would be measured alike."""
        from clipfilter_wds.offline.scoring import measured_recheck

        measured_with = options.threshold, options.measured_on, options.layout, options.embeddings
        if self._measured is None or self._measured[0] != measured_with:
            self._measured = measured_with, measured_recheck(self.scorer, options)
        return self._measured[1]

    def copy(self, tasks: Sequence[AnyCopyTask], num_workers: int | None) -> Outcomes:
        """See ``Engine``."""
        usual = max(1, min(len(tasks), num_cpus() // self._share))
        processes = usual if num_workers is None else num_workers
        if not processes:
            yield from map(_copied, tasks)
            return
        with TaskProcesses(processes) as writers:
            waiting: dict[Future[ShardStats], str] = {}
            for task in tasks:
                waiting[writers.submit(task)] = task.url
                if len(waiting) > processes + _MAX_WAITING_SHARDS:
                    yield from _take_done(writers, waiting)
            while waiting:
                yield from _take_done(writers, waiting)


def _copied(task: AnyCopyTask) -> Outcome:
    try:
        return task.url, task()
    except ShardError as error:
        return task.url, error


def _take_done(writers: TaskProcesses, waiting: dict["Future[ShardStats]", str]) -> Iterator[Outcome]:
    for done in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield _outcome(writers, waiting.pop(done), done)


def _outcome(writers: TaskProcesses, url: str, commit: "Future[ShardStats]") -> Outcome:
    try:
        return url, writers.result(commit)
    except ShardError as error:
        return url, error
