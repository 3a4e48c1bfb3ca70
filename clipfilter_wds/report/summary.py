"""Reads the summary of a run, and sees that the run is one of these score tables."""

import json
from collections.abc import Iterator
from typing import Any

from clipfilter_wds.scores.fingerprint import check_fingerprint
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.table import read_metadata
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.types import ShardIdentity

Summary = dict[str, Any]

_NAME_ONE = "name the output folder of a rewrite that chose by these scores"


def read_summary(folder: AnyPath) -> Summary:
    """The content of a run's ``summary.json``, empty where there is none.

    Raises:
        ValueError: When it is damaged.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not a run's summary: {error}") from None
    if not isinstance(summary, dict):
        raise ValueError(f"{str(path)!r} is not a run's summary: it holds no object")
    return summary


def read_rewrite(folder: AnyPath, tables: ScoreFolder) -> Summary:
    """The summary of a ``rewrite`` that chose by the scores in a folder.

    Raises:
        ValueError: When there is none, it is another command's, or one of other scores.
    """
    summary = read_summary(folder)
    if not summary:
        raise ValueError(f"run {str(folder)!r} has no summary.json; {_NAME_ONE}")
    if "keep_fraction" not in summary:
        raise ValueError(f"run {str(folder)!r} is no rewrite's, as its summary.json says; {_NAME_ONE}")
    _check_marks(folder, tables)
    return summary


def _check_marks(folder: AnyPath, tables: ScoreFolder) -> None:
    """See that a run's marks tell of the scores, and of any of the shards, that the tables are of."""
    checked = None
    for mark, record in _marks(folder):
        if checked is None:
            what = f"run {str(folder)!r} is of other scores than {str(tables.folder)!r}: {mark!r}"
            check_fingerprint(record["fingerprint"], tables.fingerprint, what, _NAME_ONE)
            checked = mark
        if any(_is_scored(source, tables) for source in record.get("sources", [record])):
            return
    if checked is not None:
        raise ValueError(
            f"run {str(folder)!r} is of other shards than the tables in {str(tables.folder)!r}; {_NAME_ONE}"
        )


def _marks(folder: AnyPath) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in folder.rglob("*_stats.json"):
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and "fingerprint" in record:  # img2dataset has files of that name, too
            yield str(path), record


def _is_scored(source: dict[str, Any], tables: ScoreFolder) -> bool:
    """Whether one of the tables is of the shard that a mark tells of."""
    path = tables.path(source["source"])
    return path is not None and read_metadata(path).identity.matches(ShardIdentity.from_record(source)) is not False
