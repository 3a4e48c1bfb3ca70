"""Looks up the scores that are known before a shard is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa

from clipfilter_wds.scores.fingerprint import check_fingerprint
from clipfilter_wds.scores.folder import ScoreFolder
from clipfilter_wds.scores.kind import COSINES
from clipfilter_wds.scores.selection import select
from clipfilter_wds.scores.table import ShardScores, read_schema
from clipfilter_wds.shards.names import public_url
from clipfilter_wds.shards.samples import SampleLayout
from clipfilter_wds.training.config import LoaderConfig
from clipfilter_wds.types import DropReason, ShardError

#: What batches hold under these names is not a column of a table.
_TAKEN = ("image", "text", "score", "__key__", "__url__", "is_padding")


class PrecomputedScore(NamedTuple):
    """The score of a sample that is known before the sample is read.

    Attributes:
        key: The sample's.
        score: Raw; 0.0 where there is a ``reason``.
        reason: Why it can't be used, if so.
        keep: Whether it passes the filter. If not, its members are not read.
        values: By name, those of further columns: numbers, NaN where they are missing; texts, None where they are.
    """

    key: str
    score: float
    reason: DropReason | None
    keep: bool
    values: Mapping[str, float | str | None] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, eq=False)
class PrecomputedScores:
    """The scores of a shard that are known before it is read.

    Attributes:
        samples: By index, of all samples or some.
        num_samples: How many the shard holds; None when that is not known.
    """

    samples: Mapping[int, PrecomputedScore]
    num_samples: int | None


#: URL of an open shard -> its scores, as far as they are known. Raises ``ShardError`` when it is not to be used.
ScoreLookup = Callable[[str], PrecomputedScores]


def no_scores(url: str) -> PrecomputedScores:
    """No scores: a :data:`ScoreLookup` for shards that were not scored before."""
    return PrecomputedScores(samples={}, num_samples=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderLookup:
    """Looks up the samples of every shard in its score table; made by the loader, used by the workers.

    Attributes:
        table: Holds the scores.
        threshold: Decides which samples are kept; None keeps all.
        failed: Shards that could not be scored, and why; they are left out.
        columns: Columns of the tables that training gets.
    """

    table: ScoreFolder
    threshold: float | None
    failed: Mapping[str, str]
    columns: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        table: ScoreFolder,
        urls: Sequence[str],
        layout: SampleLayout,
        threshold: float | None,
        columns: Sequence[str] = (),
    ) -> Self:
        """For these shards, with captions of this layout.

        Raises:
            ValueError: When some have no scores, the scores are of other captions, or the tables lack a column, or
                are a trial.
        """
        table.refuse_trial()
        _check_columns(table, columns)
        check_fingerprint(
            SampleLayout.from_fingerprint(table.fingerprint).fingerprint,
            layout.fingerprint,
            f"the score table in {str(table.folder)!r}",
        )
        lacking = table.lacking(urls)
        failed = {url: table.failed[public_url(url)] for url in lacking if public_url(url) in table.failed}
        if missing := [public_url(url) for url in lacking if url not in failed]:
            raise ValueError(
                f"{len(missing)} of {len(urls)} shards have no score table in {str(table.folder)!r}, the first "
                f"is {missing[0]!r}; write them with `clipfilter-wds score`, or leave these shards out"
            )
        return cls(table=table, threshold=threshold, failed=failed, columns=tuple(columns))

    def __call__(self, url: str) -> PrecomputedScores:
        """See :data:`ScoreLookup`.

        Raises:
            ShardError: When the shard could not be scored.
            ValueError: When the table is damaged, or of another shard.
        """
        if url in self.failed:
            raise ShardError(f"it could not be scored: {self.failed[url]}")
        try:
            scores = self.table.read(url)
        except ShardError as error:
            raise ValueError(f"{public_url(url)}: {error}") from error
        if not np.array_equal(scores.table["index"], np.arange(scores.table.num_rows)):
            raise ValueError(f"the score table of {public_url(url)} lacks samples; score the shard again")
        return precomputed_scores(scores, self.threshold, self.columns)


def _check_columns(table: ScoreFolder, columns: Sequence[str]) -> None:
    if taken := [name for name in columns if name in _TAKEN]:
        raise ValueError(f"score_columns: {taken[0]!r} is what batches call something else")
    for path in table.paths if columns else ():
        schema = read_schema(path)
        for name in columns:
            if name not in schema.names:
                raise ValueError(
                    f"score_columns: there is no column {name!r}; the score table {str(path)!r} has "
                    f"{', '.join(schema.names)}"
                )
            if not _can_be_batched(kind := schema.field(name).type):
                raise ValueError(f"score_columns: {name!r} of {str(path)!r} holds {kind}, no numbers and no texts")


def config_for(table: ScoreFolder | None, options: Mapping[str, Any]) -> LoaderConfig:
    """A loader's options, which must suit the scores that it is given beforehand, if any.

    Raises:
        ValueError: When they don't.
    """
    kind = COSINES if table is None else table.kind
    config = LoaderConfig(**options)
    config = replace(config, threshold=kind.resolve_threshold(config.threshold))
    if config.score_columns and table is None:
        raise ValueError(f"score_columns are {list(config.score_columns)}, but there is no ScoreFolder that has them")
    return config


def precomputed_scores(scores: ShardScores, threshold: float | None, columns: Sequence[str] = ()) -> PrecomputedScores:
    """The scores of a shard from its table, with the values of some of its columns."""
    table = scores.table
    keep = select(scores, threshold).keep
    further = [_values_of(table[name]) for name in columns]
    values = [dict(zip(columns, row, strict=True)) for row in zip(*further, strict=True)]
    rows = zip(
        table["index"].to_pylist(),
        table["key"].to_pylist(),
        scores.scores.tolist(),
        table["reason"].to_pylist(),
        keep.tolist(),
        values if columns else repeat(PrecomputedScore._field_defaults["values"], table.num_rows),
        strict=True,
    )
    samples = {
        index: PrecomputedScore(key, score, reason and DropReason(reason), kept, own)
        for index, key, score, reason, kept, own in rows
    }
    return PrecomputedScores(samples=samples, num_samples=table.num_rows)


def _values_of(column: pa.ChunkedArray) -> list[float | str | None]:
    """Numbers as floats, NaN where they are missing; texts as they are, bytes as hexadecimal digits."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values: list[Any] = column.to_pylist()
    if _is_one_of(column.type, _TEXTS):
        return values
    if _is_one_of(column.type, _BYTES):
        return [None if data is None else data.hex() for data in values]
    return [math.nan if number is None else float(number) for number in values]


#: What columns may hold, of all the sizes that arrow has for it.
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)


def _is_one_of(kind: pa.DataType, tests: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    return any(test(kind) for test in tests)


def _can_be_batched(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_one_of(kind, (*_TEXTS, *_BYTES, *_NUMBERS))
