"""Deletes what a run of other settings has left in the output folder, and nothing else."""

import json

from clipfilter_wds.offline.commit import OutputFiles
from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.copying import CopyOptions
from clipfilter_wds.offline.kept import Saved
from clipfilter_wds.scores.embeddings import EmbeddingFiles
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.table import read_metadata
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.storage.paths import AnyPath


def remove_others(config: ScoreConfig, fingerprint: Fingerprint) -> None:
    """Delete the outputs that this run would refuse: those of other settings, or made from another shard of the name.

    What this run would have written stays, so that it can be resumed. What has no mark of ours, or is no score table,
    stays too.
    """
    if isinstance(config, RewriteConfig):
        _remove_shards(config, fingerprint)
    if not isinstance(config, RewriteConfig) or config.scores is None:
        _remove_tables(config, fingerprint)


def _remove_shards(config: RewriteConfig, fingerprint: Fingerprint) -> None:
    settings = CopyOptions.of(config, fingerprint).settings
    sources = _sources(config) if config.samples_per_shard is None else {}
    for mark in config.folder.rglob("*_stats.json"):
        record, name = json.loads(mark.read_bytes()), _name(mark, config.folder).removesuffix("_stats.json")
        if "fingerprint" not in record:
            continue  # img2dataset's own are called so too
        found = {**record["fingerprint"], **{f"run's {each}": record.get(each) for each in settings}}
        wanted = {**fingerprint, **{f"run's {each}": value for each, value in settings.items()}}
        is_other = _differ(found, wanted) or _is_batched_otherwise(config, fingerprint, record.get("batch_size"))
        if is_other or sources.get(name, record.get("source")) != record.get("source"):
            files = OutputFiles(folder=config.folder, name=name)
            files.tar.unlink(missing_ok=True)  # before the mark, which alone says that it may be deleted
            files.forget()


def _remove_tables(config: ScoreConfig, fingerprint: Fingerprint) -> None:
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
            EmbeddingFiles.beside(config.table_folder, name).remove()
            table.unlink(missing_ok=True)


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
