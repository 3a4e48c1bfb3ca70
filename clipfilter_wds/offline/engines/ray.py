"""Does the shards of a run in Ray actors that keep the model loaded."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from clipfilter_wds.offline.commit import read_marks
from clipfilter_wds.offline.engines.engine import Outcome, Outcomes
from clipfilter_wds.offline.engines.local import LocalEngine
from clipfilter_wds.offline.engines.ray_cluster import num_assigned_cpus
from clipfilter_wds.offline.engines.ray_pool import RayPool, TaskFailure
from clipfilter_wds.offline.packing import AnyCopyTask
from clipfilter_wds.offline.score_task import ScoreTask
from clipfilter_wds.offline.scoring_options import ScoringOptions
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.types import ShardError
from clipfilter_wds.workers.cpus import num_cpus

if TYPE_CHECKING:
    from clipfilter_wds.models.scorer import ClipScorer

#: Shards that an actor does with the same workers, each written while the next is scored, at most; and how many tasks
#: are made of a run's shards at least, so that all actors have work until its end.
_MOST_TOGETHER, _FEWEST_TASKS = 8, 32


class RayEngine:
    """Does the shards on Ray. Use it in a ``with`` block.

    A shard that can't be used fails at once, as with any engine. A task that fails in another way, or whose actor dies,
    is tried again, and given up after three attempts. What actors read and write must be reachable from every node.

    Args:
        load: Makes the model, in each actor. Picklable.
        address: Of a running Ray cluster; None starts Ray on this machine.
        cpus_per_task: CPUs of each actor; None shares them out among the GPUs, and is 1 without GPUs.
        use_gpus: Give each actor a GPU, if the cluster has any.

    Raises:
        ValueError: When Ray is not installed, not to be reached, has no room, or the model can't be loaded.
    """

    def __init__(
        self,
        load: "Callable[[], ClipScorer]",
        *,
        address: str | None = None,
        cpus_per_task: int | None = None,
        use_gpus: bool = True,
    ) -> None:
        self._load, self._address = load, address
        self._cpus_per_task, self._use_gpus = cpus_per_task, use_gpus
        self._stack = ExitStack()
        self._scorers: RayPool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._stack.close()

    def fingerprint(self, options: ScoringOptions) -> Fingerprint:
        """See ``Engine``. An actor is asked: devices may differ in precision."""
        [(_, fingerprint)] = self._scorer_pool().map({"fingerprint": partial(_fingerprint, options)})
        if isinstance(fingerprint, TaskFailure):
            raise ValueError(f"no actor could load the model: {fingerprint}")
        found: Fingerprint = fingerprint
        return found

    def score(self, tasks: Sequence[ScoreTask], options: ScoringOptions, on_scored: Callable[[int], None]) -> Outcomes:
        """See ``Engine``. An actor gets a few shards at a time; where these fail together, each is tried alone."""
        pool = self._scorer_pool()
        size = max(1, min(_MOST_TOGETHER, len(tasks) // _FEWEST_TASKS))
        runs = {str(start): tasks[start : start + size] for start in range(0, len(tasks), size)}
        alone: list[ScoreTask] = []
        for name, result in pool.map({name: partial(_score, run, options) for name, run in runs.items()}):
            if isinstance(result, TaskFailure):
                alone += runs[name]
            else:
                yield from _told(result, on_scored)
        for url, result in pool.map({task.url: partial(_score, [task], options) for task in alone}):
            yield from _told([(url, _outcome(result))] if isinstance(result, TaskFailure) else result, on_scored)

    def copy(self, tasks: Sequence[AnyCopyTask], num_workers: int | None) -> Outcomes:
        """See ``Engine``. One CPU each, and as many as the cluster has."""
        if self._scorers is not None:
            self._scorers.release()
        with RayPool(_load_nothing, address=self._address, use_gpus=False, final=(ShardError,)) as pool:
            for url, result in pool.map({task.url: partial(_copy, task) for task in tasks}):
                yield url, _outcome(result)

    def _scorer_pool(self) -> RayPool:
        if self._scorers is None:
            pool = RayPool(
                partial(_Actor, self._load),
                address=self._address,
                cpus_per_task=self._cpus_per_task,
                use_gpus=self._use_gpus,
                final=(ShardError,),
            )
            self._scorers = self._stack.enter_context(pool)
        return self._scorers


class _Actor:
    """What an actor keeps: the model, and what it measured of it."""

    def __init__(self, load: "Callable[[], ClipScorer]") -> None:
        self.scorer = load()
        self._engine = LocalEngine(self.scorer, share=max(1, num_cpus() // num_assigned_cpus()))

    def score(self, tasks: Sequence[ScoreTask], options: ScoringOptions) -> list[Outcome]:
        """Do shards; those that an actor that died has done are not done again."""
        if options.num_workers is None:  # beside a GPU all CPUs decode; else one of them runs the model
            num_free = num_assigned_cpus() - (self.scorer.device.type == "cpu")
            options = replace(options, num_workers=max(1, num_free))  # an image may kill a worker, but not the actor
        outcomes: list[Outcome] = []
        left = []
        for task, found in read_marks(tasks):
            if found is None:
                left.append(task)
            else:
                outcomes.append((task.url, found))
        return [*outcomes, *(self._engine.score(left, options, lambda num_samples: None) if left else ())]


def _told(outcomes: Iterable[Outcome], on_scored: Callable[[int], None]) -> Outcomes:
    for url, outcome in outcomes:
        if isinstance(outcome, ShardStats):
            on_scored(outcome.counts.seen)
        yield url, outcome


# What actors do must be picklable.


def _fingerprint(options: ScoringOptions, actor: _Actor) -> Fingerprint:
    return options.fingerprint(actor.scorer)


def _score(tasks: Sequence[ScoreTask], options: ScoringOptions, actor: _Actor) -> list[Outcome]:
    return actor.score(tasks, options)


def _copy(task: AnyCopyTask, loaded: None) -> ShardStats:
    return task()


def _load_nothing() -> None:
    return None


def _outcome(result: Any) -> ShardStats | ShardError:
    if not isinstance(result, TaskFailure):
        stats: ShardStats = result
        return stats
    if isinstance(result.error, OSError):
        raise result.error  # the output can't be written, which is no fault of the shard
    return result.error if isinstance(result.error, ShardError) else ShardError(str(result))
