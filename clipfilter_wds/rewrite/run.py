"""The run: which shards are left to do, do them, sum up."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch.utils.data import Dataset

from clipfilter_wds.dataset import worker_loader
from clipfilter_wds.paths import AnyPath
from clipfilter_wds.recheck import Recheck
from clipfilter_wds.rewrite.collect import FailedShard
from clipfilter_wds.rewrite.config import RewriteConfig, ScoreConfig
from clipfilter_wds.rewrite.files import write_sizes
from clipfilter_wds.rewrite.outputs import Copy, Marked, Output
from clipfilter_wds.rewrite.packing import left_over
from clipfilter_wds.rewrite.plan import check_tables, plan_outputs
from clipfilter_wds.rewrite.scoring import ScoringOptions, measured_recheck, num_processors, score_shards
from clipfilter_wds.rewrite.tally import ShardStats, Tally
from clipfilter_wds.scorer import ClipScorer
from clipfilter_wds.scores import Fingerprint, ScoreTable
from clipfilter_wds.shards import public_url
from clipfilter_wds.types import ShardError
from clipfilter_wds.writer import publish_json, remove_leftovers

#: Scored shards that may wait for the disk before scoring waits for them.
_MAX_WAITING_SHARDS = 2

OnProgress = Callable[[Tally], None]
AnyOutput = TypeVar("AnyOutput", bound=Marked)


def process_shards(
    config: ScoreConfig, scorer: ClipScorer | None = None, *, on_progress: OnProgress = lambda tally: None
) -> Tally:
    """Score the shards and write their outcome, going on where an earlier run of the same settings stopped.

    Args:
        config: A :class:`ScoreConfig` for score tables, a ``RewriteConfig`` for shards of the kept samples as well.
        scorer: The model; None when the config names ``scores``.
        on_progress: Called after every batch and shard.

    Returns:
        The totals, which are also in ``summary.json``. Shards that could not be used are in ``failed``; the others are
        complete.

    Raises:
        ValueError: When the output folder was begun with other settings, or the score tables can't be used.
        OSError: When the output can't be written.
    """
    remove_leftovers(config.folder)
    if isinstance(config, RewriteConfig):
        table = None if config.scores is None else ScoreTable(config.scores)
        fingerprint = config.scoring.fingerprint(_needed(scorer)) if table is None else table.fingerprint
        if table is None and not config.needs_all_scores:
            tally = score_and_commit(config.outputs(), _needed(scorer), config.scoring, on_progress)
        else:
            tally = _score_then_copy(config, scorer, table, fingerprint, on_progress)
        write_sizes(config.folder)
    else:
        fingerprint = config.scoring.fingerprint(_needed(scorer))
        tally = score_and_commit(config.outputs(), _needed(scorer), config.scoring, on_progress)
    made_by = {"model": fingerprint["model"], "precision": fingerprint["precision"]}
    publish_json(config.folder / "summary.json", {**tally.summary(), **config.settings, **made_by})
    return tally


def _needed(scorer: ClipScorer | None) -> ClipScorer:
    if scorer is None:
        raise ValueError("scorer is None; without score tables there must be a model")
    return scorer


def _score_then_copy(
    config: RewriteConfig,
    scorer: ClipScorer | None,
    table: ScoreTable | None,
    fingerprint: Fingerprint,
    on_progress: OnProgress,
) -> Tally:
    """Copy when there are all scores: from ``table``, or made in a first pass."""
    tables: dict[str, AnyPath | None]
    if table is None:
        scored = score_and_commit(config.tables(), _needed(scorer), config.scoring, on_progress)
        tables = {output.url: output.table for output in config.tables() if public_url(output.url) not in scored.failed}
    else:
        scored = Tally(num_shards=0)
        tables = {url: table.path(url) for url in config.urls}
    if not config.needs_all_scores:
        copies = [config.copy(url, path) for url, path in tables.items()]
        return copy_and_commit(copies, fingerprint, config.num_workers, on_progress, after=scored)
    whole, failed = check_tables(config.choice, tables)
    scored.failed |= {public_url(url): why for url, why in failed.items()}
    outputs = plan_outputs(config, whole)
    others = [] if config.samples_per_shard is None else left_over(config.folder, outputs, config.samples_per_shard)
    tally = copy_and_commit(outputs, fingerprint, config.num_workers, on_progress, after=scored)
    for files in others:
        files.remove()
    return tally


def score_and_commit(
    outputs: Sequence[Output], scorer: ClipScorer, options: ScoringOptions, on_progress: OnProgress
) -> Tally:
    """Score the shards that are left; the outcome of each is written when it is scored."""
    tally = Tally(num_shards=len(outputs))
    left = {output.url: output for output in not_committed(outputs, options.fingerprint(scorer), tally)}
    on_progress(tally)
    if left:
        # On the run's first samples, whatever is left to do: a run that goes on then goes on alike.
        recheck = measured_recheck([output.url for output in outputs], scorer, options)
        _score_left(left, recheck, options, tally, on_progress)
    return tally


def not_committed(outputs: Sequence[AnyOutput], fingerprint: Fingerprint, tally: Tally) -> list[AnyOutput]:
    """The outputs that are left to do. The others are counted."""
    left = []
    for output in outputs:
        try:
            stats = output.committed(fingerprint)
        except ShardError as error:
            tally.fail(output.url, str(error))
            continue
        if stats is None:
            left.append(output)
        else:
            tally.resumed += 1
            tally.add(stats)
    return left


def _score_left(
    left: Mapping[str, Output], recheck: Recheck, options: ScoringOptions, tally: Tally, on_progress: OnProgress
) -> None:
    def on_batch(num_samples: int) -> None:
        tally.num_scored += num_samples
        on_progress(tally)

    # One thread writes while this one scores, so that neither waits for the other.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="clipfilter-writer") as writer:
        waiting: deque[tuple[str, Future[ShardStats]]] = deque()
        for shard in score_shards(list(left), recheck, options, on_batch=on_batch):
            if isinstance(shard, FailedShard):
                tally.fail(shard.url, shard.why)
            else:
                url, scores = shard
                waiting.append((url, writer.submit(left[url].commit, scores)))
            while len(waiting) > _MAX_WAITING_SHARDS or (waiting and waiting[0][1].done()):
                _settle(*waiting.popleft(), tally)
            on_progress(tally)
        while waiting:
            _settle(*waiting.popleft(), tally)
            on_progress(tally)


def _settle(url: str, commit: "Future[ShardStats]", tally: Tally) -> None:
    try:
        tally.add(commit.result())
    except ShardError as error:
        tally.fail(url, str(error))


def copy_and_commit(
    outputs: Sequence[Copy],
    fingerprint: Fingerprint,
    num_workers: int | None,
    on_progress: OnProgress,
    *,
    after: Tally,
) -> Tally:
    """Copy what is kept of the shards that are left, which have been scored; ``num_workers`` at a time.

    What counts of the scoring before it is in ``after``.
    """
    tally = Tally(
        num_shards=len(outputs) + len(after.failed),
        phase="copying",
        num_scored=after.num_scored,
        failed=dict(after.failed),
        started=time.perf_counter() - after.seconds,
    )
    left = not_committed(outputs, fingerprint, tally)
    on_progress(tally)
    processes = min(len(left), num_processors()) if num_workers is None else num_workers
    for url, stats in worker_loader(_Copies(left), num_workers=processes, in_order=False):
        if isinstance(stats, ShardStats):
            tally.num_copied += stats.counts.seen
            tally.add(stats)
        else:
            tally.fail(url, stats)
        on_progress(tally)
    return tally


class _Copies(Dataset[tuple[str, ShardStats | str]]):
    """Does a copy when it is asked for; then its URL, and the outcome or why there is none."""

    def __init__(self, outputs: Sequence[Copy]) -> None:
        self._outputs = outputs

    def __len__(self) -> int:
        return len(self._outputs)

    def __getitem__(self, index: int) -> tuple[str, ShardStats | str]:
        output = self._outputs[index]
        try:
            return output.url, output()
        except ShardError as error:
            return output.url, str(error)
