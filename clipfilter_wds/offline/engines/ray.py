"""Shards done by Ray actors, each of which keeps the model loaded and takes another shard when it is done with one."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Self

from clipfilter_wds.models.recheck import Recheck
from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.copying import CopyTask, Output
from clipfilter_wds.offline.engines.local import OnProgress
from clipfilter_wds.offline.engines.ray_pool import RayPool, TaskFailure, num_assigned_cpus
from clipfilter_wds.offline.scoring import FailedShard, ScoringOptions, measured_recheck, score_shards
from clipfilter_wds.offline.tally import ShardStats, Tally
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.types import ShardError


class RayEngine:
    """Does the shards on Ray. Use it in a ``with`` block.

    A shard that can't be used is failed, as ever. One that fails in another way, or whose actor dies, is tried again,
    and given up after three attempts. What the actors read and write must be reachable from every node.

    Args:
        load: Makes the model, in each actor. Picklable.
        address: Of a running Ray cluster; None starts Ray on this machine.
        cpus_per_task: Processors of each actor; None shares them out among the GPUs, and is 1 without GPUs.
        use_gpus: Give each actor a GPU, if the cluster has any.

    Raises:
        ValueError: When Ray is not installed, not to be reached, has no room, or the model can't be loaded.
    """

    def __init__(
        self,
        load: Callable[[], ClipScorer],
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

    def score(self, outputs: Sequence[Output], options: ScoringOptions, tally: Tally, on_progress: OnProgress) -> None:
        """See ``Engine``."""
        tasks = {output.url: partial(_score, output, options) for output in outputs}
        for url, stats in self._scorer_pool().map(tasks):
            if isinstance(stats, ShardStats):
                tally.num_scored += stats.counts.seen
            _settle(url, stats, tally, on_progress)

    def copy(self, outputs: Sequence[CopyTask], num_workers: int | None, tally: Tally, on_progress: OnProgress) -> None:
        """See ``Engine``. One processor each."""
        tasks = {output.url: partial(_copy, output) for output in outputs}
        if self._scorers is not None:
            self._scorers.release()
        with RayPool(_nothing, address=self._address, use_gpus=False, final=(ShardError,)) as pool:
            for url, stats in pool.map(tasks):
                if isinstance(stats, ShardStats):
                    tally.num_copied += stats.counts.seen
                _settle(url, stats, tally, on_progress)

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

    def __init__(self, load: Callable[[], ClipScorer]) -> None:
        self.scorer = load()
        self._recheck: Recheck | None = None

    def fingerprint(self, options: ScoringOptions) -> Fingerprint:
        return options.fingerprint(self.scorer)

    def score(self, output: Output, options: ScoringOptions) -> ShardStats:
        self._recheck = self._recheck or measured_recheck(self.scorer, options)
        if options.num_workers is None:  # beside a GPU all processors decode; else one of them runs the model
            num_free = num_assigned_cpus() - (self.scorer.device.type == "cpu")
            options = replace(options, num_workers=max(1, num_free))  # an image may kill a worker, but not the actor
        [shard] = score_shards([output.url], self._recheck, options)
        if isinstance(shard, FailedShard):
            raise ShardError(shard.why)
        return output.commit(shard[1])


def _score(output: Output, options: ScoringOptions, actor: _Actor) -> ShardStats:
    return actor.score(output, options)


def _fingerprint(options: ScoringOptions, actor: _Actor) -> Fingerprint:
    return actor.fingerprint(options)


def _copy(output: CopyTask, loaded: None) -> ShardStats:
    return output()


def _nothing() -> None:
    return None


def _settle(url: str, stats: Any, tally: Tally, on_progress: OnProgress) -> None:
    if isinstance(stats, ShardStats):
        tally.add(stats)
    elif isinstance(stats.error, ShardError):
        tally.fail(url, str(stats.error))
    elif isinstance(stats.error, OSError):
        raise stats.error  # the output can't be written, which is no fault of the shard
    else:
        tally.fail(url, str(stats))
    on_progress(tally)
