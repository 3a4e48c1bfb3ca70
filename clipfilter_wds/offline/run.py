"""Runs a config over its shards: does what is left to do, and sums up."""

from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from clipfilter_wds.offline.asked import check_asked
from clipfilter_wds.offline.bar import show_run
from clipfilter_wds.offline.batch_size import resumed_batch_size
from clipfilter_wds.offline.commit import (
    AnyTask,
    Record,
    Task,
    ask_storage,
    check_settings,
    read_marks,
    read_record,
    write_sizes,
)
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.copying import CopyOptions
from clipfilter_wds.offline.engines.config import DEFAULT_RANK_TIMEOUT
from clipfilter_wds.offline.engines.engine import Engine, Outcomes
from clipfilter_wds.offline.engines.local import LocalEngine
from clipfilter_wds.offline.engines.ranks import Ranks
from clipfilter_wds.offline.kept import Saved
from clipfilter_wds.offline.overwrite import remove_others
from clipfilter_wds.offline.packing import AnyCopyTask
from clipfilter_wds.offline.plan import plan_copying, plan_scoring, warn_of_absent_groups
from clipfilter_wds.offline.score_task import ScoreTask
from clipfilter_wds.offline.scoring_options import ScoringOptions
from clipfilter_wds.offline.tally import OnProgress, Phase, ShardStats, Tally
from clipfilter_wds.options import refuse_name
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.storage.publish import publish_json, remove_leftovers
from clipfilter_wds.types import ShardError
from clipfilter_wds.world import World

if TYPE_CHECKING:
    from clipfilter_wds.models.scorer import ClipScorer


def process_shards(
    config: ScoreConfig,
    scorer: "ClipScorer | Engine | None" = None,
    *,
    world: World | None = None,
    rank_timeout: float = DEFAULT_RANK_TIMEOUT,
    on_progress: OnProgress = lambda tally: None,
    progress: bool = False,
) -> Tally:
    """Score shards and write what comes of them. Resumes an earlier run of the same settings.

    Args:
        config: A :class:`ScoreConfig` for score tables, a ``RewriteConfig`` for shards of the kept samples as well.
        scorer: The model, or an engine that has one; None when the config names ``scores``.
        world: This rank among those that share the shards; None is a world of one.
        rank_timeout: Seconds that a rank waits for the others without a sign of progress.
        on_progress: Called after every batch and shard.
        progress: Show on stderr how far the run is, as the commands do; of several ranks, rank zero does.

    Returns:
        The totals, which are also in ``summary.json``; of a rank other than zero, those of its share. Shards that could
        not be used are in ``failed``; the others are complete.

    Raises:
        ValueError: When the output folder was begun with other settings, or the score tables can't be used.
        TypeError: When ``scorer`` is a name.
        OSError: When the output can't be written, or the other ranks don't finish.
    """
    refuse_name("scorer", scorer, "a ClipScorer of that model")
    ranks = Ranks(folder=config.folder, world=world or World(), timeout=rank_timeout)
    with show_run(config, ranks.world.rank == 0, on_progress) if progress else nullcontext(on_progress) as on_both:
        return process_share(config, scorer, ranks, on_both)


def process_share(
    config: ScoreConfig, scorer: "ClipScorer | Engine | None", ranks: Ranks, on_progress: OnProgress
) -> Tally:
    """As :func:`process_shards`, for one who has made ``ranks`` before loading the model."""
    world = ranks.world
    if config.dry_run:
        raise ValueError("dry_run is True, so nothing can be written; describe_run says what would be")
    if config.overwrite and world.world_size > 1:
        raise ValueError("overwrite is for one process; run the command once without ranks, or choose another folder")
    engine = _engine(scorer, world)
    scores = ScoreFolder(config.scores) if isinstance(config, RewriteConfig) and config.scores is not None else None
    if isinstance(config, RewriteConfig) and scores is not None:
        scores.refuse_trial()
        check_asked(scores.fingerprint, config)
    options = ScoringOptions.of(config)
    fingerprint = engine.fingerprint(options) if scores is None else scores.fingerprint
    if config.overwrite:
        remove_others(config, fingerprint)
    if scores is None:
        options = replace(options, batch_size=resumed_batch_size(config, fingerprint))
    run = _Run(
        engine=engine,
        ranks=ranks,
        options=options,
        fingerprint=fingerprint,
        on_progress=on_progress,
    )
    remove_leftovers(config.folder)
    if isinstance(config, RewriteConfig) and scores is not None:
        tally = _copy(config, run, {url: scores.path(url) for url in config.urls})
    else:
        tally = _score(config, run)
    tally.num_shards += len(config.unnameable)
    for url, why in config.unnameable.items():
        tally.fail(url, why)
    tally.missing = [public_url(url) for url in config.missing]
    remove_leftovers(config.folder)  # of actors and ranks that died on the way
    if world.rank == 0:
        _write_summary(config, tally, run.fingerprint)
    return tally


def _engine(scorer: "ClipScorer | Engine | None", world: World) -> Engine:
    if scorer is not None:  # whoever has a model has loaded what it needs
        from clipfilter_wds.models.scorer import ClipScorer

        if not isinstance(scorer, ClipScorer):
            return scorer
    return LocalEngine(scorer, world.local_world_size)


def _score(config: ScoreConfig, run: "_Run") -> Tally:
    """Score, and copy: each shard as soon as it is scored, or all when there are all scores."""
    tasks = plan_scoring(config, run.fingerprint, run.options.rechecked_at(run.fingerprint))
    if not isinstance(config, RewriteConfig) or not config.needs_all_scores:
        tally = run.ranks.run(tasks, run.score, run.on_progress)
        _fail_lost(config, run, tasks, tally)
        if isinstance(config, RewriteConfig) and run.ranks.world.rank == 0:
            warn_of_absent_groups(config.choice, [task.table for task in tasks])
        return tally
    scored = run.ranks.run_together(tasks, run.score, run.on_progress)
    tables = {task.url: task.table for task in tasks if public_url(task.url) not in scored.failed}
    tally = _copy(config, run, tables)
    tally.num_shards += len(scored.failed)
    tally.num_scored = scored.num_scored
    tally.failed = scored.failed | tally.failed
    tally.started = scored.started
    return tally


def _copy(config: RewriteConfig, run: "_Run", tables: Mapping[str, AnyPath | None]) -> Tally:
    """Copy what is kept of shards that have been scored."""
    plan = plan_copying(config, run.fingerprint, tables)
    if run.ranks.world.rank == 0:
        warn_of_absent_groups(config.choice, tables.values())
    tally = run.ranks.run(plan.tasks, run.copy, run.on_progress)
    _fail_lost(config, run, plan.tasks, tally)
    if run.ranks.world.rank == 0:
        for files in plan.superseded:
            files.remove()
    tally.cut = plan.cut
    tally.num_shards += len(plan.failed)
    tally.failed = {**plan.failed, **tally.failed}
    return tally


def _fail_lost(config: ScoreConfig, run: "_Run", tasks: Sequence[Task], tally: Tally) -> None:
    """Fail the shards that are done and whose output is not there: something has deleted it since."""
    if run.ranks.world.rank > 0:
        return
    there = {str(path) for end in ("*_stats.json", "*.tar", "*.parquet", "*.npy") for path in config.folder.rglob(end)}

    def is_lost(task: Task) -> bool:
        beside = task.embedding_paths if isinstance(task, ScoreTask) else ()
        if any(str(path) not in there for path in (task.mark, *beside)):
            return True
        return task.tar is not None and str(task.tar) not in there and read_record(task.mark)["kept"] > 0

    for task in tasks:
        if public_url(task.url) not in tally.failed and is_lost(task):
            tally.fail(task.url, "its output is gone: something has deleted it while the run was going on")


def _write_summary(config: ScoreConfig, tally: Tally, fingerprint: Fingerprint) -> None:
    if isinstance(config, RewriteConfig):
        _write_sizes(config, fingerprint)
    made_by = {"model": fingerprint["model"], "precision": fingerprint["precision"]}
    publish_json(
        config.folder / "summary.json",
        {**tally.summary(), "missing_shards": tally.missing, **config.settings, **made_by},
    )


def _write_sizes(config: RewriteConfig, fingerprint: Fingerprint) -> None:
    settings = CopyOptions.of(config, fingerprint).settings
    outputs = {f"{name}.tar" for name in config.names.values()}

    def check(mark: AnyPath, record: Record) -> None:
        if config.samples_per_shard is not None or record["shard"] in outputs:
            check_settings(mark, record, settings)  # two runs may have written at once

    write_sizes(config.folder, check)


def _by_saved(tasks: Sequence[ScoreTask]) -> dict[Saved, list[ScoreTask]]:
    """Tasks by what each saves: what is asked for, and what goes with the table that it replaces.

    Raises:
        ValueError: When a table can't hold both.
    """
    by_saved: dict[Saved, list[ScoreTask]] = {}
    for _, task in ask_storage(ScoreTask.keeping_saved, tasks):
        by_saved.setdefault(task.saved, []).append(task)
    return by_saved


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Does the tasks of a run that are left, by an engine."""

    engine: Engine
    ranks: Ranks
    options: ScoringOptions
    fingerprint: Fingerprint
    on_progress: OnProgress

    def score(self, tasks: Sequence[ScoreTask]) -> Tally:
        """Score shards, and copy those whose tasks say so."""
        tally = Tally(num_shards=len(tasks))
        left = self._not_committed(tasks, tally)
        scored_before = {task.url: copy for task, copy in ask_storage(ScoreTask.copy_left, left) if copy is not None}

        def on_scored(num_samples: int) -> None:
            tally.num_scored += num_samples
            self.on_progress(tally)

        to_score = [task for task in left if task.url not in scored_before]
        for saved, some in _by_saved(to_score).items():
            options = replace(self.options, embeddings=saved.embeddings, columns=saved.json_columns)
            self._settle(self.engine.score(some, options, on_scored), tally)
        self._copy([*scored_before.values()], tally)
        return tally

    def copy(self, tasks: Sequence[AnyCopyTask]) -> Tally:
        """Copy what is kept of shards that have been scored."""
        tally = Tally(num_shards=len(tasks), phase=Phase.COPYING)
        self._copy(self._not_committed(tasks, tally), tally)
        return tally

    def _copy(self, tasks: Sequence[AnyCopyTask], tally: Tally) -> None:
        if tasks:
            self._settle(self.engine.copy(tasks, self.options.num_workers), tally, copied=True)

    def _settle(self, outcomes: Outcomes, tally: Tally, *, copied: bool = False) -> None:
        with closing(outcomes):  # now, and not when the traceback of an interrupt is let go of
            for url, outcome in outcomes:
                if isinstance(outcome, ShardStats):
                    tally.add(outcome)
                    tally.num_copied += outcome.counts.seen if copied else 0
                else:
                    tally.fail(url, str(outcome))
                self.on_progress(tally)

    def _not_committed(self, tasks: Sequence[AnyTask], tally: Tally) -> list[AnyTask]:
        """The tasks that are left to do. The others are counted."""
        left = []
        for task, stats in read_marks(tasks):
            if isinstance(stats, ShardError):
                tally.fail(task.url, str(stats))
            elif stats is None:
                left.append(task)
            else:
                tally.resumed += 1
                tally.num_resumed += stats.counts.seen
                tally.add(stats)
        self.on_progress(tally)
        return left
