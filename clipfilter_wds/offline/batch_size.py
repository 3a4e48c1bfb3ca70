"""Finds the batch size that an earlier run scored with, so that one that resumes it gives the same bits."""

from contextlib import suppress

from clipfilter_wds.offline.commit import CURE, read_record
from clipfilter_wds.offline.config import ScoreConfig
from clipfilter_wds.scores.fingerprint import Fingerprint, check_fingerprint
from clipfilter_wds.scores.table import read_metadata
from clipfilter_wds.storage.paths import AnyPath


def resumed_batch_size(config: ScoreConfig, fingerprint: Fingerprint) -> int | None:
    """The batch size to score with: the one that the config asks for, or else the earlier run's; None for neither.

    Raises:
        ValueError: When the config asks for another one than the earlier run's, and the precision is low. Then the last
            bits of scores depend on it, and those of a run would be mixed. Scores in float32 do not.
    """
    path, found = _earlier(config)
    if found is not None and config.batch_size is not None and fingerprint["precision"] != "fp32":
        check_fingerprint({"batch_size": found}, {"batch_size": config.batch_size}, repr(str(path)), CURE)
    return config.batch_size or found


def _earlier(config: ScoreConfig) -> tuple[AnyPath, int | None]:
    """What any table says, or where there is none, any commit mark. Those that are damaged are made again."""
    for path in config.table_folder.rglob("*.parquet"):
        with suppress(ValueError):
            return path, read_metadata(path).batch_size
    for path in config.folder.rglob("*_stats.json"):
        with suppress(ValueError):
            return path, read_record(path).get("batch_size")
    return config.folder, None
