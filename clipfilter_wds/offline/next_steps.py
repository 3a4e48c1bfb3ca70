"""Says where the output of a run is, how its scores are spread, and what to run next."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.tally import Tally
from clipfilter_wds.scores.spread import Spread
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.storage.errors import without_secrets
from clipfilter_wds.storage.paths import AnyPath, RemotePath

#: Reading more tables again would take too long for a closing line.
_MAX_TABLES = 1_000
_MAX_SHOWN_SHARDS = 3


def next_steps(config: ScoreConfig, tally: Tally, *, reports: bool = False) -> Iterator[str]:
    """A line each, for people. A report is not told to make where one is made anyway, as ``reports`` says."""
    if tally.num_shards and tally.resumed == tally.num_shards:
        yield "all of it was done by an earlier run; nothing was left to do"
    if not tally.counts.kept:
        return  # the last line says why
    if isinstance(config, RewriteConfig):
        yield f"the kept samples are in {config.folder}"
        if not reports:
            yield from _after_rewrite(config)
    else:
        yield f"the score tables are in {config.folder}"
        yield from _after_score(config)


def _after_rewrite(config: RewriteConfig) -> Iterator[str]:
    scores = config.folder if config.scores is None else config.scores
    if not isinstance(scores, RemotePath):
        # Each with an option of its own: joined, names with a comma would be two.
        shards = " ".join(f"--shards {name}" for name in _shards(config))
        run = "" if config.scores is None else f" --run {_quoted(config.folder)}"
        yield (
            f"next: clipfilter-wds report {_quoted(scores)}{run} {shards} --output report.html "
            "shows what other thresholds would keep"
        )


def _after_score(config: ScoreConfig) -> Iterator[str]:
    tables = [config.table_folder / f"{name}.parquet" for name in config.names.values()]
    local = [table for table in tables if isinstance(table, Path)]
    if local and len(local) <= _MAX_TABLES:
        read = (ShardScores.read(table) for table in local if table.is_file())
        yield from Spread(table.scores[table.usable] for table in read).describe()
    if config.limit is not None:
        yield f"a trial on the first {config.limit:,} samples; next: the same without --limit, into another folder"
        return
    yield rewrite_next(" ".join(_shards(config)), config.folder, "--keep_fraction 0.3", "or --threshold in its place")


def rewrite_next(shards: str, scores: AnyPath, choice: str, remark: str = "") -> str:
    """What to run to choose by these scores, which have to be on this machine for that."""
    is_here = isinstance(scores, Path)
    first = "" if is_here else "copy them to a local folder COPY, and "
    command = f"clipfilter-wds rewrite {shards} --scores {_quoted(scores) if is_here else 'COPY'} {choice} --output DIR"
    return f"next: {first}{command}{remark and f', {remark}'}"


def _shards(config: ScoreConfig) -> list[str]:
    """The shards as they were typed, quoted for a shell, where that is short."""
    given = [config.shards] if isinstance(config.shards, str | Path) else config.shards
    return [_quoted(one) for one in given] if len(given) <= _MAX_SHOWN_SHARDS else ["SHARDS"]


def _quoted(name: object) -> str:
    return shlex.quote(without_secrets(str(name)))
