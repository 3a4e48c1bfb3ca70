"""Deletes what a run of other settings has left in the output folder, and nothing else."""

from collections.abc import Iterator
from typing import NamedTuple

from clipfilter_wds.offline.commit import OutputFiles, find_record
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.copying import CopyOptions
from clipfilter_wds.offline.kept import Saved
from clipfilter_wds.scores.embeddings import EmbeddingFiles
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.table import read_metadata
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.storage.paths import AnyPath


class Other(NamedTuple):
    """An output that this run would refuse.

    Attributes:
        paths: Its files, in the order in which they are deleted.
        is_table: Whether it is a score table, and no shard.
    """

    paths: tuple[AnyPath, ...]
    is_table: bool


def remove_others(config: ScoreConfig, fingerprint: Fingerprint) -> None:
    """Delete the outputs that this run would refuse: those of other settings, or made from another shard of the name.

    What this run would have written stays, so that it can be resumed. What has no mark of ours, or is no score table,
    stays too.
    """
    for other in [*find_others(config, fingerprint)]:
        for path in other.paths:
            path.unlink(missing_ok=True)


def find_others(config: ScoreConfig, fingerprint: Fingerprint) -> Iterator[Other]:
    """What :func:`remove_others` deletes."""
    if isinstance(config, RewriteConfig):
        yield from _find_shards(config, fingerprint)
    if not isinstance(config, RewriteConfig) or config.scores is None:
        yield from _find_tables(config, fingerprint)


def _find_shards(config: RewriteConfig, fingerprint: Fingerprint) -> Iterator[Other]:
    settings = CopyOptions.of(config, fingerprint).settings
    sources = _sources(config) if config.samples_per_shard is None else {}
    for mark in config.folder.rglob("*_stats.json"):
        record, name = find_record(mark), _name(mark, config.folder).removesuffix("_stats.json")
        if record is None:
            continue
        found = {**record["fingerprint"], **{f"run's {each}": record.get(each) for each in settings}}
        wanted = {**fingerprint, **{f"run's {each}": value for each, value in settings.items()}}
        is_other = _differ(found, wanted) or _is_batched_otherwise(config, fingerprint, record.get("batch_size"))
        if is_other or sources.get(name, record.get("source")) != record.get("source"):
            files = OutputFiles(folder=config.folder, name=name)
            yield Other((files.tar, files.mark), False)  # the mark last, which alone says that the tar may be deleted


def _find_tables(config: ScoreConfig, fingerprint: Fingerprint) -> Iterator[Other]:
    sources = _sources(config)
    for table in config.table_folder.rglob("*.parquet"):
        try:
            found = read_metadata(table)
        except ValueError:
            continue  # somebody else's
        name = _name(table, config.table_folder).removesuffix(".parquet")
        is_other = _differ(found.fingerprint, fingerprint)
        is_other |= _is_batched_otherwise(config, fingerprint, found.batch_size)
        is_other |= Saved.found_in(found).contradicts(Saved.asked_by(config)) is not None
        if is_other or sources.get(name, found.shard) != found.shard:
            files = EmbeddingFiles.beside(config.table_folder, name)
            yield Other((files.image, files.text, table), True)


def _is_batched_otherwise(config: ScoreConfig, fingerprint: Fingerprint, found: int | None) -> bool:
    """Whether the last bits of low-precision scores are of another batch size than the one that is asked for."""
    asked = config.batch_size
    return fingerprint["precision"] != "fp32" and asked is not None and found is not None and found != asked


def _sources(config: ScoreConfig) -> dict[str, str]:
    return {name: public_url(url) for url, name in config.names.items()}


def _name(path: AnyPath, folder: AnyPath) -> str:
    return str(path)[len(str(folder)) + 1 :]


def _differ(found: Fingerprint, wanted: Fingerprint) -> bool:
    try:
        check_fingerprint(found, wanted, "it")
    except ValueError:
        return True
    return False
