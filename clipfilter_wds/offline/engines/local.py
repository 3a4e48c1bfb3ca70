"""Who does the shards of a run: an engine. This one does them in this process and its DataLoader workers."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, Protocol, Self, TypeVar

from torch.utils.data import Dataset

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.copying import CopyTask, Output
from clipfilter_wds.offline.scoring import FailedShard, ScoringOptions, measured_recheck, score_shards
from clipfilter_wds.offline.tally import ShardStats, Tally
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.types import ShardError
from clipfilter_wds.workers.cpus import default_num_workers, num_processors
from clipfilter_wds.workers.pool import iterating, worker_loader

#: Scored shards that may wait for the disk before scoring waits for them.
_MAX_WAITING_SHARDS = 2

OnProgress = Callable[[Tally], None]


class Engine(Protocol):
    """Does shards, whatever their order; the tally says of each how it went."""

    def fingerprint(self, options: ScoringOptions) -> Fingerprint:
        """What the scores depend on beside the shards."""

    def score(self, outputs: Sequence[Output], options: ScoringOptions, tally: Tally, on_progress: OnProgress) -> None:
        """Score shards and write the outcome of each."""

    def copy(self, outputs: Sequence[CopyTask], num_workers: int | None, tally: Tally, on_progress: OnProgress) -> None:
        """Copy what is kept of shards that have been scored."""


class LocalEngine:
    """Does the shards in this process and its workers.

    Args:
        scorer: The model; None when there is nothing to score.
        share: How many processes like this one have to share the machine's processors.
    """

    def __init__(self, scorer: ClipScorer | None, share: int = 1) -> None:
        self._scorer, self._share = scorer, share

    @property
    def scorer(self) -> ClipScorer:
        """The model.

        Raises:
            ValueError: When there is none.
        """
        if self._scorer is None:
            raise ValueError("scorer is None; without score tables there must be a model")
        return self._scorer

    def fingerprint(self, options: ScoringOptions) -> Fingerprint:
        """See :class:`Engine`."""
        return options.fingerprint(self.scorer)

    def score(self, outputs: Sequence[Output], options: ScoringOptions, tally: Tally, on_progress: OnProgress) -> None:
        """See :class:`Engine`. One thread writes while this one scores, so that neither waits for the other."""

        def on_batch(num_samples: int) -> None:
            tally.num_scored += num_samples
            on_progress(tally)

        if options.num_workers is None:
            num_workers = max(1, default_num_workers(self.scorer.device) // self._share)
            options = replace(options, num_workers=num_workers)
        recheck = measured_recheck(self.scorer, options)
        commits = {output.url: output.commit for output in outputs}
        waiting: deque[tuple[str, Future[ShardStats]]] = deque()
        with (
            Background[ShardStats]("clipfilter-writer") as writer,
            closing(score_shards(list(commits), recheck, options, on_batch=on_batch)) as shards,
        ):
            for shard in shards:
                if isinstance(shard, FailedShard):
                    tally.fail(shard.url, shard.why)
                else:
                    url, scores = shard
                    waiting.append((url, writer.submit(partial(commits[url], scores))))
                while len(waiting) > _MAX_WAITING_SHARDS or (waiting and waiting[0][1].done()):
                    _settle(*waiting.popleft(), tally)
                on_progress(tally)
            while waiting:
                _settle(*waiting.popleft(), tally)
                on_progress(tally)

    def copy(self, outputs: Sequence[CopyTask], num_workers: int | None, tally: Tally, on_progress: OnProgress) -> None:
        """See :class:`Engine`. ``num_workers`` at a time."""
        usual = max(1, min(len(outputs), num_processors() // self._share))
        processes = usual if num_workers is None else num_workers
        with iterating(worker_loader(_Copies(outputs), num_workers=processes, in_order=False)) as copies:
            for url, stats in copies:
                if isinstance(stats, ShardStats):
                    tally.num_copied += stats.counts.seen
                    tally.add(stats)
                else:
                    tally.fail(url, stats)
                on_progress(tally)


def _settle(url: str, commit: "Future[ShardStats]", tally: Tally) -> None:
    try:
        tally.add(commit.result())
    except ShardError as error:
        tally.fail(url, str(error))


class _Copies(Dataset[tuple[str, ShardStats | str]]):
    """Does a copy when it is asked for; then its URL, and the outcome or why there is none."""

    def __init__(self, outputs: Sequence[CopyTask]) -> None:
        self._outputs = outputs

    def __len__(self) -> int:
        return len(self._outputs)

    def __getitem__(self, index: int) -> tuple[str, ShardStats | str]:
        output = self._outputs[index]
        try:
            return output.url, output()
        except ShardError as error:
            return output.url, str(error)


T = TypeVar("T")

#: Seconds that a run which is stopped waits for what is being done.
_GRACE_SECONDS = 1.5


class Background(Generic[T]):
    """One thread that does what it is given, in order. Use it in a ``with`` block, which ends when all is done.

    When the block ends with an exception, what has not begun is never done; and what takes long is left behind, also by
    the end of the program, since a slow storage may take minutes and Ctrl-C shall not.
    """

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = SimpleQueue()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def submit(self, task: Callable[[], T]) -> "Future[T]":
        """Have something done."""
        future: Future[T] = Future()
        self._tasks.put((future, task))
        return future

    def _run(self) -> None:
        while (item := self._tasks.get()) is not None and not self._is_stopped:
            future, task = item
            try:
                future.set_result(task())
            except BaseException as error:  # noqa: BLE001  # raised again where the result is taken
                future.set_exception(error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: Any) -> None:
        self._is_stopped = kind is not None
        self._tasks.put(None)
        self._thread.join(_GRACE_SECONDS if self._is_stopped else None)
