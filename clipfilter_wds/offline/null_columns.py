"""Says which columns hold nothing, and what the json members have instead."""

from collections.abc import Iterator
from itertools import islice

from clipfilter_wds.offline.config import RewriteConfig, ScoreConfig
from clipfilter_wds.offline.tally import ShardStats
from clipfilter_wds.options import did_you_mean
from clipfilter_wds.preprocess.json_columns import COLUMN_TYPES, column_name, fields_of
from clipfilter_wds.preprocess.json_member import json_member
from clipfilter_wds.scores.table import table_schema
from clipfilter_wds.shards.open import open_shard
from clipfilter_wds.shards.samples import read_samples
from clipfilter_wds.types import Sample, ShardError

#: So many fields are named; and in so many shards, and samples of each, a json member is looked for.
_MAX_NAMED, _MAX_SHARDS, _MAX_SAMPLES = 10, 3, 20


def describe_null_columns(stats: ShardStats, config: ScoreConfig) -> Iterator[str]:
    """A line for each column that the run takes and that is null in all samples."""
    null = [
        source
        for source, count in stats.null_columns.items()
        if count == stats.counts.seen and _is_taken(source, config)
    ]
    fields = _found_fields(config) if null else {}
    for source in null:
        yield f"column {column_name(source)!r} is null in all {stats.counts.seen:,} samples. {_cure(source, fields)}"


def _is_taken(source: str, config: ScoreConfig) -> bool:
    name = column_name(source)
    is_chosen_by = isinstance(config, RewriteConfig) and (name in str(config.where or "") or name == config.group_by)
    return source in config.column_sources or is_chosen_by


def _cure(source: str, fields: dict[str, str]) -> str:
    if not fields:
        return "The first samples have no json member with fields"
    shown = [f"{name} ({kind})" for name, kind in fields.items()]
    more = [f"and {len(shown) - _MAX_NAMED} others"] if len(shown) > _MAX_NAMED else []
    found = f"The fields of the first json member are {', '.join([*shown[:_MAX_NAMED], *more])}"
    name = column_name(source)
    taken = table_schema().names
    can_be = {name: _written(name, kind) for name, kind in fields.items() if kind in COLUMN_TYPES and name not in taken}
    if name in can_be and can_be[name] != _written(name, source.rpartition("=")[2]):
        return f"{found}. Name its type: --columns {can_be[name]}"
    if name in fields:
        return found
    alike = did_you_mean(name, can_be, "{}")
    meant = next((written for field, written in can_be.items() if alike.endswith(f" {field}?")), None)
    return found if meant is None else f"{found}; did you mean {meant}?"


def _written(name: str, kind: str) -> str:
    """How the option names a field."""
    return f"json:{name}" if kind == COLUMN_TYPES[0] else f"json:{name}={kind}"


def _found_fields(config: ScoreConfig) -> dict[str, str]:
    """The fields of the first json member that there is, with their types."""
    for url in config.urls[:_MAX_SHARDS]:
        for text in _json_members(url, config):
            if fields := fields_of(text):
                return fields
    return {}


def _json_members(url: str, config: ScoreConfig) -> list[str]:
    try:
        with open_shard(url) as shard:
            items = islice(read_samples(shard, config.layout, pair_only=True), _MAX_SAMPLES)
            return [text for item in items if isinstance(item, Sample) and (text := json_member(item)) is not None]
    except ShardError:
        return []  # the run says why
