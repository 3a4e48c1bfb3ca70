"""The run: which shards are left to do, have them done, sum up."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from clipfilter_wds.models.scorer import ClipScorer
from clipfilter_wds.offline.commit import Marked, OutputFiles, read_marks, write_sizes
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.copying import CopyTask, Output
from clipfilter_wds.offline.engines.local import Engine, LocalEngine, OnProgress
from clipfilter_wds.offline.engines.ranks import DEFAULT_RANK_TIMEOUT, Ranks
from clipfilter_wds.offline.packing import left_over
from clipfilter_wds.offline.plan import check_tables, copy_output, plan_outputs, table_outputs
from clipfilter_wds.offline.scoring import ScoringOptions
from clipfilter_wds.offline.tally import Tally
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.storage.publish import publish_json, remove_leftovers
from clipfilter_wds.types import ShardError
from clipfilter_wds.world import World

AnyOutput = TypeVar("AnyOutput", bound=Marked)


def process_shards(
    config: ScoreConfig,
    scorer: ClipScorer | Engine | None = None,
    *,
    world: World | None = None,
    rank_timeout: float = DEFAULT_RANK_TIMEOUT,
    on_progress: OnProgress = lambda tally: None,
) -> Tally:
    """Score the shards and write their outcome, going on where an earlier run of the same settings stopped.

    Args:
        config: A :class:`ScoreConfig` for score tables, a ``RewriteConfig`` for shards of the kept samples as well.
        scorer: The model, or an engine that has one; None when the config names ``scores``.
        world: This rank among those that share the shards; None is a world of one.
        rank_timeout: Seconds that a rank waits for the others without a sign of progress.
        on_progress: Called after every batch and shard.

    Returns:
        The totals, which are also in ``summary.json``; of a rank other than zero, those of its share. Shards that could
        not be used are in ``failed``; the others are complete.

    Raises:
        ValueError: When the output folder was begun with other settings, or the score tables can't be used.
        OSError: When the output can't be written, or the other ranks don't finish.
    """
    world = world or World()
    engine = LocalEngine(scorer, world.local_world_size) if scorer is None or isinstance(scorer, ClipScorer) else scorer
    ranks = Ranks(folder=config.folder, world=world, timeout=rank_timeout, on_progress=on_progress)
    table = ScoreFolder(config.scores) if isinstance(config, RewriteConfig) and config.scores is not None else None
    options = ScoringOptions.of(config)
    fingerprint = engine.fingerprint(options) if table is None else table.fingerprint
    run = _Run(engine=engine, ranks=ranks, options=options, fingerprint=fingerprint, on_progress=on_progress)
    remove_leftovers(config.folder)
    if isinstance(config, RewriteConfig) and (table is not None or config.needs_all_scores):
        tally = _score_then_copy(config, run, table)
    else:
        outputs: Sequence[Output] = table_outputs(config)
        if isinstance(config, RewriteConfig):
            outputs = [copy_output(config, output.url, output.table) for output in table_outputs(config)]
        tally = ranks.run(outputs, fingerprint, run.score)
    remove_leftovers(config.folder)  # of actors and ranks that died on the way
    if world.rank == 0:
        _write_summary(config, tally, fingerprint)
    return tally


def _write_summary(config: ScoreConfig, tally: Tally, fingerprint: Fingerprint) -> None:
    if isinstance(config, RewriteConfig):
        write_sizes(config.folder)
    made_by = {"model": fingerprint["model"], "precision": fingerprint["precision"]}
    publish_json(config.folder / "summary.json", {**tally.summary(), **config.settings, **made_by})


def _score_then_copy(config: RewriteConfig, run: "_Run", table: ScoreFolder | None) -> Tally:
    """Copy when there are all scores: from ``table``, or made in a first pass."""
    tables: dict[str, AnyPath | None]
    if table is None:
        scored = run.ranks.run_together(table_outputs(config), run.score)
        tables = {
            output.url: output.table for output in table_outputs(config) if public_url(output.url) not in scored.failed
        }
    else:
        scored = Tally(num_shards=0)
        tables = {url: table.path(url) for url in config.urls}
    if not config.needs_all_scores:
        outputs: Sequence[CopyTask] = [copy_output(config, url, path) for url, path in tables.items()]
        others: Sequence[OutputFiles] = []
    else:
        whole, failed = check_tables(config.choice, tables)
        scored.failed |= {public_url(url): why for url, why in failed.items()}
        outputs = plan_outputs(config, whole)
        size = config.samples_per_shard
        others = [] if size is None else left_over(config.folder, outputs, size)
    tally = run.ranks.run(outputs, run.fingerprint, run.copy)
    if run.ranks.world.rank == 0:
        for files in others:
            files.remove()
    tally.num_shards += len(scored.failed)
    tally.num_scored = scored.num_scored
    tally.failed = scored.failed | tally.failed
    tally.started = min(tally.started, scored.started)
    return tally


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What does the shards of a run, and how."""

    engine: Engine
    ranks: Ranks
    options: ScoringOptions
    fingerprint: Fingerprint
    on_progress: OnProgress

    def score(self, outputs: Sequence[Output]) -> Tally:
        """Score the shards that are left; the outcome of each is written when it is scored."""
        tally = Tally(num_shards=len(outputs))
        left = not_committed(outputs, self.fingerprint, tally)
        self.on_progress(tally)
        if left:
            self.engine.score(left, self.options, tally, self.on_progress)
        return tally

    def copy(self, outputs: Sequence[CopyTask]) -> Tally:
        """Copy what is kept of the shards that are left, which have been scored."""
        tally = Tally(num_shards=len(outputs), phase="copying")
        left = not_committed(outputs, self.fingerprint, tally)
        self.on_progress(tally)
        if left:
            self.engine.copy(left, self.options.num_workers, tally, self.on_progress)
        return tally


def not_committed(outputs: Sequence[AnyOutput], fingerprint: Fingerprint, tally: Tally) -> list[AnyOutput]:
    """The outputs that are left to do. The others are counted."""
    left = []
    for output, stats in read_marks(outputs, fingerprint):
        if isinstance(stats, ShardError):
            tally.fail(output.url, str(stats))
        elif stats is None:
            left.append(output)
        else:
            tally.resumed += 1
            tally.add(stats)
    return left
