"""Reads and writes score tables: a parquet file per shard, with the fingerprint of what made the scores."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter_wds.preprocess.json_columns import JsonValue
from clipfilter_wds.preprocess.rows import SampleRows
from clipfilter_wds.scores.finite import finite_scores
from clipfilter_wds.scores.metadata import ScoreMetadata, VersionError
from clipfilter_wds.shards.identity import check_identity
from clipfilter_wds.storage.paths import AnyPath
from clipfilter_wds.types import NO_REASON, DropReason, ShardIdentity

_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("index", pa.int32()),
        ("score", pa.float32()),
        ("reason", pa.string()),
        ("num_tokens", pa.int32()),
        ("truncated", pa.bool_()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("uid", pa.binary(16)),
    ]
)

#: Types of further columns, as ``COLUMN_TYPES`` calls them.
_ARROW_TYPES = {"number": pa.float64(), "integer": pa.int64(), "text": pa.string(), "bool": pa.bool_()}


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardScores:
    """The scores of one shard, a row per sample in the order of the shard.

    Attributes:
        table: Columns ``key``, ``index``, ``score`` (raw, of the metadata's kind; 0.0 where there is a reason),
            ``reason`` (a ``DropReason`` or null), ``num_tokens``, ``truncated``, ``width``, ``height``, ``uid``
            (16 bytes, big-endian; null where the sample's json member has none).
        metadata: What was scored, and how.

    Raises:
        ValueError: When they differ in the number of samples, the rows are in another order, a reason is unknown, or a
            score without one is no finite number.
    """

    table: pa.Table
    metadata: ScoreMetadata

    def __post_init__(self) -> None:
        if self.table.num_rows != self.metadata.num_samples:
            raise ValueError(f"it holds {self.table.num_rows} of {self.metadata.num_samples} samples")
        if not (np.diff(self.table["index"].to_numpy()) >= 0).all():  # what a loader records may come twice
            raise ValueError("its rows are not in the order of the shard; sort them by index")
        if len(rows := np.flatnonzero(self.usable & ~np.isfinite(self.scores))):
            key, score = self.keys[rows[0]], self.scores[rows[0]]
            raise ValueError(f"the score of sample {key!r} is {score}, and no reason says why")
        unknown = set(self.table["reason"].unique().drop_null().to_pylist()) - set(DropReason)
        if unknown:
            raise ValueError(f"it holds the reason {min(unknown)!r}, which this version knows nothing of")

    @classmethod
    def from_rows(
        cls,
        rows: SampleRows,
        scores: np.ndarray,
        metadata: ScoreMetadata,
        values: Sequence[tuple[JsonValue, ...]] = (),
    ) -> Self:
        """Make a table of rows in any order.

        Args:
            rows: Of all samples.
            scores: Of the rows without a reason, in the same order: raw, float32 ``[N]``. One that is NaN or
                infinite is none: its sample gets the reason ``not_finite``.
            metadata: What the table says of itself.
            values: Of all rows, in the same order, those of the metadata's ``columns``.

        Raises:
            ValueError: When there are more or fewer scores than rows without a reason.
        """
        all_scores, reasons = finite_scores(rows.reasons, scores)
        numbers = {name: rows.numbers[name] for name in rows.numbers.dtype.names or ()}
        texts = reason_texts(reasons)
        columns = {**numbers, "key": rows.keys, "uid": rows.uids, "score": all_scores, "reason": texts}
        schema = table_schema(metadata.columns)
        columns |= dict(zip(schema.names[len(_SCHEMA) :], zip(*values, strict=True), strict=False))
        table = pa.table([columns.get(name, ()) for name in schema.names], schema=schema)
        return cls(table=table.sort_by("index").combine_chunks(), metadata=metadata)

    def write(self, file: BinaryIO) -> None:
        """Write as parquet."""
        pq.write_table(self.table.replace_schema_metadata(self.metadata.to_schema()), file)

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        """Read what :meth:`write` wrote.

        Raises:
            ValueError: When the file is no score table of this version.
            OSError: When the storage fails.
        """
        data = _content(path)
        with _naming_file(path):
            table = pq.read_table(pa.BufferReader(data))
            metadata = ScoreMetadata.from_schema(table.schema.metadata)
            return cls(table=_in_our_types(table), metadata=metadata)

    @property
    def scores(self) -> np.ndarray:
        """Raw scores, float32 ``[num_samples]``."""
        scores: np.ndarray = self.table["score"].to_numpy()
        return scores

    @property
    def keys(self) -> list[str]:
        """Per sample, its key."""
        keys: list[str] = self.table["key"].to_pylist()
        return keys

    @property
    def usable(self) -> np.ndarray:
        """Per sample, whether it could be scored: bool ``[num_samples]``."""
        usable: np.ndarray = self.table["reason"].is_null().to_numpy()
        return usable

    @property
    def uids(self) -> list[bytes | None]:
        """Per sample, its uid."""
        uids: list[bytes | None] = self.table["uid"].to_pylist()
        return uids

    @property
    def reasons(self) -> np.ndarray:
        """Per sample, why it could not be scored: int8 ``[num_samples]`` of ``REASON_CODES``, or ``NO_REASON``."""
        codes = pc.index_in(self.table["reason"], pa.array(list(DropReason), pa.string()))
        reasons: np.ndarray = codes.fill_null(NO_REASON).to_numpy().astype(np.int8)
        return reasons

    @property
    def num_truncated(self) -> int:
        """How many captions were longer than the text tower takes."""
        return int(self.table["truncated"].to_numpy().sum())

    @property
    def dropped(self) -> dict[DropReason, int]:
        """Per reason, how many samples could not be scored."""
        counts = Counter(self.table["reason"].drop_null().to_pylist())
        return {reason: counts[reason] for reason in DropReason if counts[reason]}


def table_schema(sources: Sequence[str] = ()) -> pa.Schema:
    """The columns of a table, with further ones that are named as ``ScoreMetadata.columns`` does.

    Raises:
        ValueError: When one has the name of a column that every table has.
    """
    fields = [source.removeprefix("json:").rpartition("=") for source in sources]
    for name, _, _ in fields:
        if name in _SCHEMA.names:
            raise ValueError(f"columns: json:{name} has the name of a column that every score table has")
    return pa.schema([*_SCHEMA, *(pa.field(name, _ARROW_TYPES[kind]) for name, _, kind in fields)])


def reason_texts(reasons: np.ndarray) -> pa.Array:
    """Reasons as the column holds them, given int8 ``[N]`` of ``REASON_CODES``, or ``NO_REASON``."""
    return pa.array(list(DropReason), pa.string()).take(pa.array(reasons, mask=reasons == NO_REASON))


def _in_our_types(table: pa.Table) -> pa.Table:
    """With float32 scores and so on, as other programs may not leave them that join columns to a table.

    Raises:
        KeyError: When it lacks a column that every table has.
        pa.ArrowException: When one holds something else.
    """
    for field in _SCHEMA:
        if (column := table[field.name]).type != field.type:
            place = table.schema.get_field_index(field.name)
            table = table.set_column(place, field, column.cast(field.type))
    return table


def no_rows() -> pa.Table:
    """The table of a shard without samples."""
    return _SCHEMA.empty_table()


def read_metadata(path: AnyPath) -> ScoreMetadata:
    """What a score table says of itself, without reading the scores.

    Raises:
        ValueError: When the file is no score table of this version.
        OSError: When the storage fails.
    """
    with _opened(path) as file:
        return ScoreMetadata.from_schema(pq.read_metadata(file).metadata)


def read_schema(path: AnyPath) -> pa.Schema:
    """The columns of a score table, without reading the scores.

    Raises:
        ValueError: When the file is no parquet file.
        OSError: When the storage fails.
    """
    with _opened(path) as file:
        return pq.read_schema(file)


def read_scores(path: AnyPath, url: str) -> ShardScores:
    """The scores of a shard, from its table.

    Raises:
        ShardError: When the shard is not the one that was scored; see ``check_identity``.
        ValueError: When the table is damaged.
    """
    scores = ShardScores.read(path)
    check_identity(url, scores.metadata.identity, path)
    return scores


def check_table(path: AnyPath, url: str) -> ShardIdentity:
    """See that a shard is the one whose scores a table holds, without reading the scores.

    Raises:
        ShardError: When it is not; see ``check_identity``.
        ValueError: When the file is no score table of this version.
    """
    return check_identity(url, read_metadata(path).identity, path)


@contextmanager
def _opened(path: AnyPath) -> Iterator[BinaryIO]:
    """A table to read a part of. Given the path itself, pyarrow would take ``run:1/0.parquet`` for a URL."""
    if isinstance(path, Path) and path.is_file():
        with _naming_file(path), path.open("rb") as file:
            yield file
    else:
        data = _content(path)
        with _naming_file(path):
            yield BytesIO(data)


def _content(path: AnyPath) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"there is no score table {str(path)!r}") from error
    except PermissionError as error:
        raise ValueError(f"can't read the score table {str(path)!r}: {error.strerror}") from error
    except IsADirectoryError as error:
        raise ValueError(f"{str(path)!r} is a folder, not a score table") from error


@contextmanager
def _naming_file(path: AnyPath) -> Iterator[None]:
    """Say which file is no score table, in whatever way its content shows it."""
    try:
        yield
    except VersionError as error:
        raise ValueError(f"{str(path)!r} {error}") from None
    except PermissionError as error:
        raise ValueError(f"can't read the score table {str(path)!r}: {error.strerror}") from error
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is not a score table of clipfilter-wds: {str(error).rstrip('.')}; if it is a damaged one, "
            "delete it, and the command that made it makes it anew"
        ) from error
