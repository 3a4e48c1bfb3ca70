"""Says what a run would read, keep and write, and writes nothing."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from clipfilter_wds.models.config import ScorerConfig
from clipfilter_wds.offline.asked import check_asked, expected_fingerprint, is_other_model
from clipfilter_wds.offline.batch_size import resumed_batch_size
from clipfilter_wds.offline.commit import OutputFiles, ask_storage, read_record
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.copying import CopyOptions, CopyTask
from clipfilter_wds.offline.overwrite import Other, find_others
from clipfilter_wds.offline.packing import AnyCopyTask, PackTask
from clipfilter_wds.offline.plan import plan_copying, plan_scoring
from clipfilter_wds.offline.score_task import ScoreTask
from clipfilter_wds.scores.fingerprint import Fingerprint
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import ShardScores, read_metadata
from clipfilter_wds.shards.open import shard_identity
from clipfilter_wds.types import ShardError

AnyTask = TypeVar("AnyTask", ScoreTask, CopyTask | PackTask)

_NOTHING_LEFT = "all of it was done by an earlier run; nothing would be written but the summary"


def describe_run(config: ScoreConfig, scorer: ScorerConfig | None = None) -> Iterator[str]:
    """A line each, for people.

    Args:
        config: The run.
        scorer: Its model, which is not loaded.

    Raises:
        ValueError: When the score tables that ``config`` names can't be used, or the run would refuse what is in its
            output.
    """
    sizes = [size for _, size in ask_storage(_num_bytes_of, config.urls)]
    known = [size for size in sizes if size is not None]
    yield f"would read {_shards(len(sizes))}, {_size(sum(known))}"
    if len(known) < len(sizes):
        yield f"the sizes of {len(sizes) - len(known):,} are not known, or they can't be read"
    if config.missing:
        yield f"missing, and would be left out: {_shards(len(config.missing))}"
    if isinstance(config, RewriteConfig) and config.scores is not None:
        yield from _describe_copying(config, ScoreFolder(config.scores))
    else:
        yield from _describe_scoring(config, scorer)


# --- with scores ---


def _describe_copying(config: RewriteConfig, scores: ScoreFolder) -> Iterator[str]:
    scores.refuse_trial()
    check_asked(scores.fingerprint, config)
    deleted = [*find_others(config, scores.fingerprint)] if config.overwrite else []
    yield from _describe_deleted(deleted)
    tables = {url: scores.path(url) for url in config.urls}
    if lacking := sum(table is None for table in tables.values()):
        yield f"without a score table, and would fail: {_shards(lacking)}"
    plan = plan_copying(config, scores.fingerprint, {url: table for url, table in tables.items() if table is not None})
    for url, why in plan.failed.items():
        yield f"{url} would fail: {why}"
    done = _done(plan.tasks, deleted)
    counts = {task.url: count for task, count in ask_storage(lambda task: _count(config, task), plan.tasks)}
    seen, kept = (sum(count[part] for count in counts.values()) for part in (0, 1))
    num_tars = sum(num_kept > 0 for url, (_, num_kept) in counts.items() if url not in done)
    yield f"would keep {kept:,} of {seen:,} samples ({kept / max(seen, 1):.1%})"
    if plan.tasks and len(done) == len(plan.tasks):
        yield _NOTHING_LEFT
    else:
        yield f"would write {_shards(num_tars)} to {config.folder}"
        yield from _describe_done(done)
    if plan.cut is not None:
        yield f"cut: {plan.cut.describe()}"


def _count(config: RewriteConfig, task: AnyCopyTask) -> tuple[int, int]:
    """How many samples an output is made of, and how many it keeps."""
    if isinstance(task, PackTask):
        return sum(one.stop - one.start for one in task.sources), sum(one.num_kept for one in task.sources)
    assert task.table is not None
    counts = config.choice.select(ShardScores.read(task.table), task.cutoff).stats
    return counts.seen, counts.kept


# --- without ---


def _describe_scoring(config: ScoreConfig, scorer: ScorerConfig | None) -> Iterator[str]:
    made = "shards of what is kept, and score tables," if isinstance(config, RewriteConfig) else "score tables"
    what = "all of it" if config.limit is None else f"the first {config.limit:,} samples"
    found = _earlier_fingerprint(config)
    if found is None:
        yield f"would score {what}, and write {made} to {config.folder}"
        return
    if scorer is not None and is_other_model(found, scorer):
        then = "deleted" if config.overwrite else "refused"
        yield (
            f"{config.folder} was written with the model {found['model']}; if the weights of {scorer.model} are "
            f"others, that is {then}. What follows holds if they are the same"
        )
    fingerprint = expected_fingerprint(found, config, scorer)
    deleted = [*find_others(config, fingerprint)] if config.overwrite else []
    yield from _describe_deleted(deleted)
    if not deleted:
        resumed_batch_size(config, fingerprint)  # raises where the run would
    threshold = config.choice.threshold if isinstance(config, RewriteConfig) else None
    tasks = plan_scoring(config, fingerprint, None if fingerprint["precision"] == "fp32" else threshold)
    done = _done(tasks, deleted)
    if isinstance(config, RewriteConfig) and config.needs_all_scores:
        _check_marks(config, fingerprint, deleted)
    left = [task for task in tasks if task.url not in done]
    there = [task for task in left if str(task.table) not in _paths(deleted)]
    scored = {task.url for task, copy in ask_storage(ScoreTask.copy_left, there) if copy is not None}
    for _ in ask_storage(ScoreTask.keeping_saved, [task for task in there if task.url not in scored]):
        pass  # raises where the run would
    if len(left) > len(scored):
        is_all = len(left) - len(scored) == len(tasks) or config.limit is not None
        some = what if is_all else f"{_shards(len(left) - len(scored))} of it"
        yield f"would score {some}, and write {made} to {config.folder}"
    if scored:
        yield f"scored by an earlier run, and would be copied from: {_shards(len(scored))}"
    if left:
        yield from _describe_done(done)
    elif isinstance(config, RewriteConfig) and config.needs_all_scores:
        yield f"all of it is scored by an earlier run; would choose by these scores, and write to {config.folder}"
    else:
        yield _NOTHING_LEFT


def _earlier_fingerprint(config: ScoreConfig) -> Fingerprint | None:
    """That of any output of an earlier run."""
    for table in config.table_folder.rglob("*.parquet"):
        with suppress(ValueError):
            return read_metadata(table).fingerprint
    for mark in config.folder.rglob("*_stats.json"):
        with suppress(ValueError):
            fingerprint: Fingerprint = read_record(mark)["fingerprint"]
            return fingerprint
    return None


def _check_marks(config: RewriteConfig, fingerprint: Fingerprint, deleted: Sequence[Other]) -> None:
    """Refuse outputs of other settings, which the run finds when all is scored."""
    settings, gone = CopyOptions.of(config, fingerprint).settings, _paths(deleted)
    for mark in config.folder.rglob("*_stats.json"):
        name = str(mark)[len(str(config.folder)) + 1 :].removesuffix("_stats.json")
        is_ours = config.samples_per_shard is not None or name in config.names.values()
        if is_ours and str(mark) not in gone:
            OutputFiles(folder=config.folder, name=name).find_mark(settings, fingerprint)


# --- both ---


def _done(tasks: Sequence[AnyTask], deleted: Sequence[Other]) -> set[str]:
    """The tasks, by their URLs, that an earlier run has done.

    Raises:
        ValueError: As ``Task.committed``.
    """
    gone = _paths(deleted)

    def is_done(task: AnyTask) -> bool:
        with suppress(ShardError):  # it would fail, and the run says why
            return str(task.mark) not in gone and task.is_done()
        return False

    return {task.url for task, done in ask_storage(is_done, tasks) if done}


def _paths(deleted: Sequence[Other]) -> set[str]:
    return {str(path) for other in deleted for path in other.paths}


def _describe_deleted(deleted: Sequence[Other]) -> Iterator[str]:
    num_tables = sum(other.is_table for other in deleted)
    found = [f"{num_tables:,} score table{'' if num_tables == 1 else 's'}"] if num_tables else []
    if num_shards := len(deleted) - num_tables:
        found.insert(0, _shards(num_shards))
    if found:
        yield f"would delete {' and '.join(found)} of other settings"


def _describe_done(done: set[str]) -> Iterator[str]:
    if done:
        yield f"done by an earlier run, and stays: {_shards(len(done))}"


def _shards(number: int) -> str:
    return f"{number:,} shard{'' if number == 1 else 's'}"


def _size(num_bytes: int) -> str:
    unit, size = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if num_bytes >= pair[1]), ("kB", 1e3))
    return f"{num_bytes / size:,.1f} {unit}"


def _num_bytes_of(url: str) -> int | None:
    try:
        size = shard_identity(url).num_bytes
    except ShardError:
        return None
    return None if size < 0 else size
