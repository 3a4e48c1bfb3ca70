"""Says what a run would read, keep and write, and writes nothing."""

from collections.abc import Iterator

from clipfilter_wds.offline.commit import ask_storage
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.packing import AnyCopyTask, PackTask
from clipfilter_wds.offline.plan import plan_copying
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores
from clipfilter_wds.shards.open import shard_identity
from clipfilter_wds.types import ShardError


def describe_run(config: ScoreConfig) -> Iterator[str]:
    """A line each, for people.

    Raises:
        ValueError: When the score tables that ``config`` names can't be used.
    """
    sizes = [size for _, size in ask_storage(_num_bytes_of, config.urls)]
    known = [size for size in sizes if size is not None]
    yield f"would read {_shards(len(sizes))}, {sum(known) / 1e9:,.3f} GB"
    if len(known) < len(sizes):
        yield f"the sizes of {len(sizes) - len(known):,} are not known, or they can't be read"
    if config.missing:
        yield f"missing, and would be left out: {_shards(len(config.missing))}"
    if isinstance(config, RewriteConfig) and config.scores is not None:
        yield from _describe_copying(config, ScoreFolder(config.scores))
        return
    made = "shards of what is kept, and score tables," if isinstance(config, RewriteConfig) else "score tables"
    yield f"would score all of it, and write {made} to {config.folder}"
    ends = "_stats.json" if isinstance(config, RewriteConfig) else ".parquet"
    marks = [config.folder / f"{name}{ends}" for name in config.names.values()]
    if num_done := sum(is_there for _, is_there in ask_storage(lambda mark: mark.is_file(), marks)):
        yield f"done there already, and stays where the settings are the same: {_shards(num_done)}"


def _describe_copying(config: RewriteConfig, scores: ScoreFolder) -> Iterator[str]:
    scores.refuse_trial()
    tables = {url: scores.path(url) for url in config.urls}
    if lacking := sum(table is None for table in tables.values()):
        yield f"without a score table, and would fail: {_shards(lacking)}"
    plan = plan_copying(config, scores.fingerprint, {url: table for url, table in tables.items() if table is not None})
    for url, why in plan.failed.items():
        yield f"{url} would fail: {why}"
    counts = [count for _, count in ask_storage(lambda task: _count(config, task), plan.tasks)]
    seen, kept = (sum(count[part] for count in counts) for part in (0, 1))
    num_tars = sum(num_kept > 0 for _, num_kept in counts)
    yield f"would keep {kept:,} of {seen:,} samples ({kept / max(seen, 1):.1%})"
    yield f"would write {_shards(num_tars)} to {config.folder}"
    if plan.cut is not None:
        yield f"cut: {plan.cut.describe()}"


def _count(config: RewriteConfig, task: AnyCopyTask) -> tuple[int, int]:
    """How many samples an output is made of, and how many it keeps."""
    if isinstance(task, PackTask):
        return sum(one.stop - one.start for one in task.sources), sum(one.num_kept for one in task.sources)
    assert task.table is not None
    counts = config.choice.select(ShardScores.read(task.table), task.cutoff).stats
    return counts.seen, counts.kept


def _shards(number: int) -> str:
    return f"{number:,} shard{'' if number == 1 else 's'}"


def _num_bytes_of(url: str) -> int | None:
    try:
        size = shard_identity(url).num_bytes
    except ShardError:
        return None
    return None if size < 0 else size
