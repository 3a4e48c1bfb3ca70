"""Score tables -> what each output shard is made of, where that takes all of them."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress, pairwise

import numpy as np

from clipfilter_wds.offline.commit import OutputFiles
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.copying import CopyOutput, CopyTask, TableOutput
from clipfilter_wds.offline.duplicate_keys import find_suffixes
from clipfilter_wds.offline.packing import PackedOutput, Source, check_covered
from clipfilter_wds.scores.fraction import Cutoff, find_cutoffs
from clipfilter_wds.scores.selection import Choice
from clipfilter_wds.scores.table import ShardScores, check_table
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.types import ShardError

#: Storage is asked for the sizes of this many shards at a time.
_ASKED_AT_ONCE = 16


def table_outputs(config: ScoreConfig) -> list[TableOutput]:
    """Where the scores of each shard go."""
    folder = config.folder / "_scores" if isinstance(config, RewriteConfig) else config.folder
    return [TableOutput(url=url, table=folder / f"{name}.parquet") for url, name in config.names.items()]


def copy_output(config: RewriteConfig, url: str, table: AnyPath | None, cutoff: Cutoff | None = None) -> CopyOutput:
    """Where the kept samples of a shard go that has this table."""
    files = OutputFiles(folder=config.folder, name=config.names[url])
    return CopyOutput(url=url, files=files, table=table, choice=config.choice, cutoff=cutoff, layout=config.layout)


def check_tables(choice: Choice, tables: Mapping[str, AnyPath | None]) -> tuple[dict[str, AnyPath], dict[str, str]]:
    """The shards, by URL, that are the ones that were scored and can be chosen from, and why the others can't."""

    def check(url: str, table: AnyPath | None) -> str | None:
        if table is None:
            return "there is no score table of it; score it first"
        try:
            check_table(table, url)
            if choice.subset is not None:
                choice.candidates(ShardScores.read(table))
        except ShardError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        problems = dict(zip(tables, pool.map(check, tables, tables.values()), strict=True))
    whole = {url: table for url, table in tables.items() if table is not None and problems[url] is None}
    return whole, {url: problem for url, problem in problems.items() if problem is not None}


def cutoffs_of(choice: Choice, tables: Mapping[str, AnyPath]) -> list[Cutoff | None]:
    """Per shard, the cutoff that the choice comes to. Holds one table at a time."""
    if choice.keep_fraction is None:
        return [None] * len(tables)

    def read() -> Iterator[np.ndarray]:
        return (choice.candidates(ShardScores.read(table)) for table in tables.values())

    return list(find_cutoffs(read, choice.keep_fraction))


def plan_outputs(config: RewriteConfig, tables: Mapping[str, AnyPath]) -> Sequence[CopyTask]:
    """What the run writes. The same tables give the same plan, whoever makes it."""
    cutoffs = cutoffs_of(config.choice, tables)
    if config.samples_per_shard is None:
        return [
            copy_output(config, url, table, cutoff)
            for (url, table), cutoff in zip(tables.items(), cutoffs, strict=True)
        ]
    return _plan_packing(config, config.samples_per_shard, tables, cutoffs)


def _plan_packing(
    config: RewriteConfig, samples_per_shard: int, tables: Mapping[str, AnyPath], cutoffs: Sequence[Cutoff | None]
) -> list[PackedOutput]:
    def read_keys() -> Iterator[list[str]]:
        for table, cutoff in zip(tables.values(), cutoffs, strict=True):
            scores = ShardScores.read(table)
            yield list(compress(scores.keys, config.choice.select(scores, cutoff).keep))

    suffixes = find_suffixes(read_keys)
    outputs, start = [], 0
    for number, sources in enumerate(_pack(config.choice, samples_per_shard, tables, cutoffs)):
        stop = start + sum(source.num_kept for source in sources)
        output = PackedOutput(
            files=OutputFiles(folder=config.folder, name=f"{number:05d}"),
            sources=tuple(sources),
            suffixes=suffixes.between(start, stop),
            choice=config.choice,
            samples_per_shard=samples_per_shard,
            layout=config.layout,
        )
        outputs.append(output)
        start = stop
    return outputs


def _pack(
    choice: Choice, samples_per_shard: int, tables: Mapping[str, AnyPath], cutoffs: Sequence[Cutoff | None]
) -> list[list[Source]]:
    """Per output, where its samples come from. An output ends behind its last kept sample, the last one at the end."""
    outputs: list[list[Source]] = [[]]
    counts = {}
    room = samples_per_shard
    for (url, table), cutoff in zip(tables.items(), cutoffs, strict=True):
        scores = ShardScores.read(table)
        kept = np.flatnonzero(choice.select(scores, cutoff).keep)
        num_samples = scores.table.num_rows
        counts[url] = (num_samples, len(kept))
        stops = [*(kept[room - 1 :: samples_per_shard] + 1).tolist(), num_samples]
        for start, stop in pairwise([0, *stops]):
            num_kept = int(((kept >= start) & (kept < stop)).sum())
            if start < stop or not num_samples:
                source = Source(
                    url=url,
                    table=table,
                    num_bytes=scores.num_bytes,
                    cutoff=cutoff,
                    start=start,
                    stop=stop,
                    num_kept=num_kept,
                    to_end=stop == num_samples,
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
