"""Score tables -> what each output shard is made of, where that takes all scores."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clipfilter_wds.fraction import Cutoff, find_cutoffs
from clipfilter_wds.paths import AnyPath
from clipfilter_wds.rewrite.config import RewriteConfig
from clipfilter_wds.rewrite.outputs import CopyOutput
from clipfilter_wds.scores import ShardScores, check_table
from clipfilter_wds.selection import Choice
from clipfilter_wds.types import ShardError

#: Storage is asked for the sizes of this many shards at a time.
_ASKED_AT_ONCE = 16


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


def plan_copies(config: RewriteConfig, tables: Mapping[str, AnyPath]) -> list[CopyOutput]:
    """Each shard's kept samples in a shard of the same name."""
    cutoffs = cutoffs_of(config.choice, tables)
    return [config.copy(url, table, cutoff) for (url, table), cutoff in zip(tables.items(), cutoffs, strict=True)]
