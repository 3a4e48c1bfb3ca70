"""Plans a run: which shards are scored, and what each output shard is made of."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, pairwise

import numpy as np

from clipfilter_wds.offline.commit import OutputFiles, ask_storage
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.copying import CopyOptions, CopyTask
from clipfilter_wds.offline.duplicate_keys import find_suffixes
from clipfilter_wds.offline.packing import AnyCopyTask, PackTask, Source, check_covered, left_over
from clipfilter_wds.offline.score_task import ScoreTask
from clipfilter_wds.scores.embeddings import EmbeddingFiles
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.fraction import Cut, Cutoff, find_group_cutoffs
from clipfilter_wds.scores.groups import GroupCutoffs
from clipfilter_wds.scores.selection import AnyCutoff, Choice
from clipfilter_wds.scores.table import ShardScores, check_table
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.types import ShardError

_log = logging.getLogger(__name__)


def plan_scoring(config: ScoreConfig, fingerprint: Fingerprint, rechecked_at: float | None) -> list[ScoreTask]:
    """A task per shard. It is copied right after it is scored where that takes no other shard's scores."""
    tasks = []
    for url, name in config.names.items():
        table, copy = config.table_folder / f"{name}.parquet", None
        if isinstance(config, RewriteConfig) and not config.needs_all_scores:
            copy = _copy_task(config, CopyOptions.of(config, fingerprint), url, table)
        task = ScoreTask(
            url=url,
            table=table,
            fingerprint=fingerprint,
            rechecked_at=rechecked_at,
            files=EmbeddingFiles.beside(config.table_folder, name),
            embeddings=config.embeddings,
            columns=config.column_sources,
            copy=copy,
        )
        tasks.append(task)
    return tasks


@dataclass(frozen=True, kw_only=True)
class CopyPlan:
    """What is copied of shards that have been scored. The same tables give the same plan, on every rank.

    Attributes:
        tasks: One per output shard.
        failed: Shards that can't be copied from, and why.
        superseded: Outputs of an earlier plan, which are deleted when those of this one are there.
        cut: Where the scores that are kept end, when a fraction of them is.
    """

    tasks: Sequence[AnyCopyTask]
    failed: Mapping[str, str] = field(default_factory=dict)
    superseded: Sequence[OutputFiles] = ()
    cut: Cut | None = None


def plan_copying(config: RewriteConfig, fingerprint: Fingerprint, tables: Mapping[str, AnyPath | None]) -> CopyPlan:
    """Plan from the score tables of the shards.

    Args:
        config: What is kept.
        fingerprint: What the scores depend on beside the shards.
        tables: Per shard, its score table; None when there is none.

    Raises:
        ValueError: When the output folder holds what was made to another kind of plan.
    """
    options = CopyOptions.of(config, fingerprint)
    if not config.needs_all_scores:
        return CopyPlan(tasks=[_copy_task(config, options, url, table) for url, table in tables.items()])
    whole, failed = _check_tables(config.choice, tables)
    cutoffs = _cutoffs_of(config.choice, whole)
    whole_run = [cutoff for cutoff in cutoffs if isinstance(cutoff, Cutoff)]
    cut = Cut.of(whole_run) if config.choice.keep_fraction is not None and config.choice.groups is None else None
    if config.samples_per_shard is None:
        shards = zip(whole.items(), cutoffs, strict=True)
        tasks = [_copy_task(config, options, url, table, cutoff) for (url, table), cutoff in shards]
        return CopyPlan(tasks=tasks, failed=failed, cut=cut)
    packed = _plan_packing(config, options, whole, cutoffs)
    superseded = left_over(config.folder, packed, config.samples_per_shard)
    return CopyPlan(tasks=packed, failed=failed, superseded=superseded, cut=cut)


def _copy_task(
    config: RewriteConfig, options: CopyOptions, url: str, table: AnyPath | None, cutoff: AnyCutoff | None = None
) -> CopyTask:
    files = OutputFiles(folder=config.folder, name=config.names[url])
    return CopyTask(url=url, table=table, cutoff=cutoff, files=files, options=options)


def _check_tables(choice: Choice, tables: Mapping[str, AnyPath | None]) -> tuple[dict[str, AnyPath], dict[str, str]]:
    """The shards that are the ones that were scored and can be chosen from, and why the others can't."""

    def check(shard: tuple[str, AnyPath | None]) -> str | None:
        url, table = shard
        if table is None:
            return "there is no score table of it; score it first"
        try:
            check_table(table, url)
            if choice.needs_columns:
                choice.candidates_by_group(ShardScores.read(table))
        except ShardError as error:
            return str(error)
        return None

    whole, failed = {}, {}
    for (url, table), problem in ask_storage(check, [*tables.items()]):
        if problem is not None:
            failed[public_url(url)] = problem
        elif table is not None:
            whole[url] = table
    return whole, failed


def _cutoffs_of(choice: Choice, tables: Mapping[str, AnyPath]) -> Sequence[AnyCutoff | None]:
    """Per shard, the cutoff that the choice comes to. Holds one table at a time."""
    if choice.keep_fraction is None:
        return [None] * len(tables)

    def read() -> Iterator[dict[str, np.ndarray]]:
        return (choice.candidates_by_group(ShardScores.read(table)) for table in tables.values())

    found = find_group_cutoffs(read, choice.fraction_of)
    if choice.groups is None:
        return [cutoffs[""] for cutoffs in found]
    return list(map(GroupCutoffs, found))


def warn_of_absent_groups(choice: Choice, tables: Iterable[AnyPath | None]) -> None:
    """Tell of limits whose group is in none of the tables, as one that is misspelt is. Holds a few tables at a time."""
    groups = choice.groups
    if groups is None:
        return

    def groups_of(table: AnyPath | None) -> set[str]:
        try:
            return set() if table is None else set(groups.of(ShardScores.read(table)))
        except (ShardError, ValueError, OSError):
            return set()  # its shard fails for that

    found = set().union(*(of_one for _, of_one in ask_storage(groups_of, [*tables])))
    if absent := sorted(groups.limits.keys() - found):
        _log.warning(
            "group_limits has a limit for %s, and no sample has that as its %s", ", ".join(absent), groups.column
        )


def _plan_packing(
    config: RewriteConfig, options: CopyOptions, tables: Mapping[str, AnyPath], cutoffs: Sequence[AnyCutoff | None]
) -> list[PackTask]:
    def read_keys() -> Iterator[list[str]]:
        for table, cutoff in zip(tables.values(), cutoffs, strict=True):
            scores = ShardScores.read(table)
            yield list(compress(scores.keys, config.choice.select(scores, cutoff).keep))

    suffixes = find_suffixes(read_keys)
    tasks, start = [], 0
    for number, sources in enumerate(_pack(config, tables, cutoffs)):
        stop = start + sum(source.num_kept for source in sources)
        task = PackTask(
            sources=tuple(sources),
            suffixes=suffixes.between(start, stop),
            files=OutputFiles(folder=config.folder, name=f"{number:05d}"),
            options=options,
        )
        tasks.append(task)
        start = stop
    return tasks


def _pack(
    config: RewriteConfig, tables: Mapping[str, AnyPath], cutoffs: Sequence[AnyCutoff | None]
) -> list[list[Source]]:
    """Per output, where its samples come from. An output ends behind its last kept sample, the last one at the end."""
    samples_per_shard = config.samples_per_shard
    assert samples_per_shard is not None
    outputs: list[list[Source]] = [[]]
    counts = {}
    room = samples_per_shard
    for (url, table), cutoff in zip(tables.items(), cutoffs, strict=True):
        scores = ShardScores.read(table)
        selection = config.choice.select(scores, cutoff)
        kept = np.flatnonzero(selection.keep)
        num_samples = scores.table.num_rows
        counts[url] = (num_samples, len(kept))
        stops = [*(kept[room - 1 :: samples_per_shard] + 1).tolist(), num_samples]
        for start, stop in pairwise([0, *stops]):
            num_kept = int(((kept >= start) & (kept < stop)).sum())
            if start < stop or not num_samples:
                source = Source(
                    url=url,
                    table=table,
                    identity=scores.metadata.identity,
                    cutoff=cutoff,
                    start=start,
                    stop=stop,
                    num_kept=num_kept,
                    to_end=stop == num_samples,
                    selection=selection.digest(start, stop) if config.choice.uses_further_columns else None,
                )
                outputs[-1].append(source)
            room -= num_kept
            if not room:
                outputs.append([])
                room = samples_per_shard
    if len(outputs) > 1 and not any(source.num_kept for source in outputs[-1]):
        rest = outputs.pop()
        outputs[-1] += rest  # nothing kept is left for one more
    check_covered(outputs, counts)
    return [sources for sources in outputs if sources]
