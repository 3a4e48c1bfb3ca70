"""Runs ``rescore`` and ``dedup``: prepares the method, makes the tables that are left to make, and sums up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfilter_wds.models.device import resolve_device
from clipfilter_wds.models.fast.float32 import float32_products
from clipfilter_wds.offline.commit import read_marks
from clipfilter_wds.offline.engines.config import DEFAULT_RANK_TIMEOUT
from clipfilter_wds.offline.engines.ranks import Ranks
from clipfilter_wds.offline.rescoring.by_embeddings import neg_clip_loss, norm_sim
from clipfilter_wds.offline.rescoring.by_scores import combination
from clipfilter_wds.offline.rescoring.by_similarity import dedup
from clipfilter_wds.offline.rescoring.config import DedupConfig, RescoreConfig, RescoringConfig
from clipfilter_wds.offline.rescoring.method import Method, OnPreparing
from clipfilter_wds.offline.rescoring.sources import Sources
from clipfilter_wds.offline.tally import OnProgress, Phase, ShardStats, Tally
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.metadata import ScoreMetadata
from clipfilter_wds.scores.rescore.derived import derive, has_columns_of
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.storage.publish import publish, publish_json, remove_leftovers
from clipfilter_wds.types import ShardError
from clipfilter_wds.world import World

_CURE = "choose another folder"


def rescore_shards(
    config: RescoreConfig | DedupConfig,
    *,
    world: World | None = None,
    rank_timeout: float = DEFAULT_RANK_TIMEOUT,
    on_preparing: OnPreparing = lambda preparing: None,
    on_progress: OnProgress = lambda tally: None,
) -> Tally:
    """Make score tables from score tables. Resumes an earlier run of the same settings.

    Args:
        config: A :class:`RescoreConfig` for other scores, a ``DedupConfig`` to drop near-duplicates.
        world: This rank among those that share the shards, which each prepare the method; None is a world of one.
        rank_timeout: Seconds that a rank waits for the others without a sign of progress.
        on_preparing: Called now and then until the first shard is scored.
        on_progress: Called after every shard.

    Returns:
        The totals, which are also in ``summary.json``; of a rank other than zero, those of its share.

    Raises:
        ValueError: When the tables or embeddings can't be used, or the output folder was begun with other settings,
            holds tables of other shards, or a damaged one.
        OSError: When the output can't be written, or the other ranks don't finish.
    """
    with float32_products(resolve_device(config.device)):
        return _rescore(config, world or World(), rank_timeout, on_preparing, on_progress)


def _rescore(
    config: RescoringConfig, world: World, rank_timeout: float, on_preparing: OnPreparing, on_progress: OnProgress
) -> Tally:
    ranks = Ranks(folder=config.folder, world=world, timeout=rank_timeout)
    remove_leftovers(config.folder)
    sources, method = _prepare(config, on_preparing)
    run = _Run(sources=sources, method=method, fingerprint=method.fingerprint(sources), on_progress=on_progress)
    tasks = [
        RescoreTask(
            number=shard.number,
            url=shard.metadata[0].shard,
            source=shard.tables[method.base],
            table=config.folder / f"{shard.name}.parquet",
            metadata=method.metadata(shard, run.fingerprint),
        )
        for shard in sources.shards
    ]
    tally = ranks.run(tasks, run.rescore, on_progress)
    if world.rank == 0:
        _write_summary(config, tally, sources, run.fingerprint)
    return tally


def _prepare(config: RescoringConfig, on_preparing: OnPreparing) -> tuple[Sources, Method]:
    device = resolve_device(config.device)
    if isinstance(config, DedupConfig):
        sources = Sources([config.scores], embeddings=config.embeddings)
        _check_none_beyond(config, sources)
        return sources, dedup(config, sources, device, on_preparing)
    assert isinstance(config, RescoreConfig)
    sources = Sources(config.folders, embeddings=config.embeddings, use_embeddings=config.uses_embeddings)
    _check_none_beyond(config, sources)
    if not config.uses_embeddings:
        return sources, combination(config, sources, on_preparing)
    prepare = neg_clip_loss if config.method == "neg_clip_loss" else norm_sim
    return sources, prepare(config, sources, device, on_preparing)


def _check_none_beyond(config: RescoringConfig, sources: Sources) -> None:
    """Refuse an output with tables of other shards: whoever reads the folder would take them as well."""
    made = {str(config.folder / f"{name}.parquet") for name in sources.names}
    if beyond := sorted({str(path) for path in config.folder.rglob("*.parquet")} - made):
        raise ValueError(
            f"the output holds tables of shards that the scores it is made of have none of: {beyond[0]!r}"
            f"{f' and {len(beyond) - 1} more' if len(beyond) > 1 else ''}; delete them, or {_CURE}"
        )


def _write_summary(config: RescoringConfig, tally: Tally, sources: Sources, fingerprint: Fingerprint) -> None:
    made_by = {name: fingerprint[name] for name in ("score", "model", "precision", "derived") if name in fingerprint}
    publish_json(config.folder / "summary.json", {**tally.summary(), "failed_shards": sources.failed, **made_by})


@dataclass(frozen=True, kw_only=True)
class RescoreTask:
    """Makes one table of new scores, once; see ``Task``. The table is its own mark.

    Attributes:
        number: The shard's place in the run.
        url: The shard.
        source: The table that gets new scores.
        table: Where its new scores go.
        metadata: What the table will say of itself.
    """

    number: int
    url: str
    source: Path
    table: AnyPath
    metadata: ScoreMetadata

    @property
    def mark(self) -> AnyPath:
        """See ``Task``."""
        return self.table

    @property
    def tar(self) -> None:
        """See ``Task``."""

    def committed(self) -> ShardStats | None:
        """See ``Task``. A table that was made of another one, or one of other columns, is made anew."""
        if not self.table.is_file():
            return None
        scores = ShardScores.read(self.table)
        check_fingerprint(scores.metadata.fingerprint, self.metadata.fingerprint, repr(str(self.table)), _CURE)
        is_same = scores.metadata == self.metadata and has_columns_of(scores, ShardScores.read(self.source))
        return _stats_of(scores) if is_same else None


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Makes the tables that are left to make."""

    sources: Sources
    method: Method
    fingerprint: Mapping[str, Any]
    on_progress: OnProgress

    def rescore(self, tasks: Sequence[RescoreTask]) -> Tally:
        """Do these, in this process."""
        tally = Tally(num_shards=len(tasks), phase=Phase.RESCORING)
        left = []
        for task, stats in read_marks(tasks):
            assert not isinstance(stats, ShardError)  # no shard is read
            if stats is None:
                left.append(task)
            else:
                tally.resumed += 1
                tally.add(stats)
        for task in left:
            self.on_progress(tally)
            scores = self._rescore(task)
            tally.add(_stats_of(scores))
            tally.num_scored += scores.table.num_rows
        self.on_progress(tally)
        return tally

    def _rescore(self, task: RescoreTask) -> ShardScores:
        shard = self.sources.shard(task.number)
        found = self.method.score(shard)
        scores = derive(shard.scores[self.method.base], found.scores, found.reasons, task.metadata)
        with publish(task.table) as file:
            scores.write(file)
        return scores


def _stats_of(scores: ShardScores) -> ShardStats:
    return ShardStats(
        counts=select(scores, None).stats,
        torn=scores.metadata.torn,
        truncated_captions=scores.num_truncated,
        band=scores.metadata.band,
        rechecked=scores.metadata.rechecked,
    )
