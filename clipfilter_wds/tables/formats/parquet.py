"""Reads and writes parquet tables."""

import io
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter_wds.tables.formats.json_lines import BadLines
from clipfilter_wds.tables.formats.rows import Record, Rows, TableWriter, Wanted, duplicate_column

_READ_BYTES = 1 << 20
#: A run of rows that hold images is shorter, so that it is hardly larger.
_RUN_BYTES = 1 << 24
#: A row group is written when it has this many rows or bytes.
_GROUP_ROWS, _GROUP_BYTES = 1 << 16, 1 << 26


class ParquetReader:
    """Reads a parquet file. Schema, metadata and compression stay as they are.

    Args:
        file: The open file.
        wanted: What to read and add.

    Raises:
        ValueError: When it is no parquet file, lacks a wanted column, or has it in a type that holds no images or text.
    """

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        self.bad_lines = BadLines()
        # Read piece by piece of a column, as it is needed: a row group may be larger than memory.
        self._file = pq.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)
        self._name, self._wanted, self._num_read = str(file.name), wanted, 0
        self.columns = self._file.schema_arrow.names
        wanted.check(self.columns)
        for key, holds, what in (
            (wanted.image_key, _holds_images, "images are paths, URLs, bytes, or structs of bytes and path"),
            (wanted.caption_key, _holds_text, "captions are text"),
        ):
            found = self._file.schema_arrow.types[self._index(key)]
            if not holds(found):
                raise ValueError(f"column {key!r} holds {found}; {what}, or lists of one of these")

    def read(self) -> Iterator[Rows]:
        """See :class:`TableReader`."""
        try:
            yield from self._read()
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise OSError(f"can't read {self._name!r} behind row {self._num_read:,}: {error}") from error

    def _read(self) -> Iterator[Rows]:
        image, caption = self._index(self._wanted.image_key), self._index(self._wanted.caption_key)
        for batch in self._file.iter_batches(batch_size=self._wanted.num_rows):
            for run in _runs_of(batch):
                images, captions = run.column(image).to_pylist(), run.column(caption).to_pylist()
                self._num_read += run.num_rows
                yield Rows(stored=run, images=images, captions=captions)

    def done(self) -> float:
        """See :class:`TableReader`."""
        return float(self._num_read / max(1, self._file.metadata.num_rows))

    def obstacle(self) -> str | None:
        """See :class:`TableReader`."""
        for field in self._file.schema_arrow:
            if _holds_bytes(field.type):
                return f"column {field.name!r} holds {field.type}, and only parquet holds bytes"
        return duplicate_column(self.columns)

    def records(self, rows: Rows) -> list[Record]:
        """See :class:`TableReader`."""
        records: list[Record] = rows.stored.to_pylist()
        return [{column: _plain(value) for column, value in record.items()} for record in records]

    def writer(self, file: BinaryIO) -> TableWriter:
        """See :class:`TableReader`."""
        return _ParquetWriter(file, self._file.schema_arrow, self._wanted.score_key, self._compressions())

    def _compressions(self) -> list[str]:
        """How each column is compressed, those within others too, as a writer takes it."""
        metadata = self._file.metadata
        if not metadata.num_row_groups:
            return ["snappy"] * metadata.num_columns
        group = metadata.row_group(0)
        found = [str(group.column(index).compression).lower() for index in range(metadata.num_columns)]
        return [name.replace("uncompressed", "none") for name in found]

    def _index(self, key: str) -> int:
        index: int = self._file.schema_arrow.names.index(key)  # the first, if several have this name
        return index


def _paths_of(schema: pa.Schema) -> list[str]:
    """What a file of this schema calls its columns, those within others too; other writers call some otherwise."""
    file = io.BytesIO()
    pq.write_table(schema.empty_table(), file)
    columns = pq.ParquetFile(file).schema
    return [columns.column(index).path for index in range(len(columns))]


def _runs_of(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in runs of about so many bytes, since some of them are on their way to workers at a time."""
    num_runs = min(-(-batch.nbytes // _RUN_BYTES), batch.num_rows) or 1
    num_rows = -(-batch.num_rows // num_runs) or 1
    return (batch.slice(start, num_rows) for start in range(0, batch.num_rows, num_rows))


def _holds_images(found: pa.DataType) -> bool:
    if pa.types.is_struct(found):
        return any(field.name in ("bytes", "path") for field in found)
    return _is_binary(found) or _holds_text(found) or (_is_list(found) and _holds_images(found.value_type))


def _holds_text(found: pa.DataType) -> bool:
    if _is_list(found):
        return _holds_text(found.value_type)
    return not pa.types.is_nested(found) and not _is_binary(found)


def _is_list(found: pa.DataType) -> bool:
    kinds = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
    return any(getattr(pa.types, f"is_{kind}")(found) for kind in kinds)


def _is_binary(found: pa.DataType) -> bool:
    kinds = ("binary", "large_binary", "fixed_size_binary", "binary_view")
    return any(getattr(pa.types, f"is_{kind}")(found) for kind in kinds)


def _holds_bytes(found: pa.DataType) -> bool:
    if pa.types.is_dictionary(found):
        return _holds_bytes(found.value_type)
    children = [found.field(index).type for index in range(found.num_fields)]
    return _is_binary(found) or any(map(_holds_bytes, children))


def _plain(value: Any) -> Any:
    """The value in what JSON has: numbers that it lacks are None, dates ISO text, and the rest text."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _kept(batch: pa.RecordBatch, keep: np.ndarray) -> pa.RecordBatch:
    """The rows that ``keep`` (bool ``[N]``) marks."""
    try:
        return batch.filter(pa.array(keep))
    except pa.ArrowNotImplementedError:  # of string views, as some libraries write them
        edges = np.flatnonzero(np.diff(keep, prepend=False, append=False)).reshape(-1, 2).tolist()
        runs = [batch.slice(start, stop - start) for start, stop in edges] or [batch.slice(0, 0)]
        columns = [pa.concat_arrays([run.column(index) for run in runs]) for index in range(batch.num_columns)]
        return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


class _ParquetWriter:
    def __init__(self, file: BinaryIO, schema: pa.Schema, score_key: str | None, compressions: list[str]) -> None:
        self._has_score = score_key is not None
        self._schema = schema if score_key is None else schema.append(pa.field(score_key, pa.float32()))
        # That of the score is the last one's.
        compression = dict(zip(_paths_of(self._schema), [*compressions, compressions[-1]], strict=False))
        self._writer = pq.ParquetWriter(file, self._schema, compression=compression)
        self._waiting: list[pa.RecordBatch] = []

    def write(self, rows: Rows, keep: np.ndarray, similarity: np.ndarray) -> None:
        columns = rows.stored.columns
        if self._has_score:
            columns = [*columns, pa.array(similarity)]
        self._waiting.append(_kept(pa.RecordBatch.from_arrays(columns, schema=self._schema), keep))
        if (
            sum(b.num_rows for b in self._waiting) >= _GROUP_ROWS
            or sum(b.nbytes for b in self._waiting) >= _GROUP_BYTES
        ):
            self._write_group()

    def finish(self) -> None:
        self._write_group()

    def close(self) -> None:
        self._writer.close()

    def _write_group(self) -> None:
        table = pa.Table.from_batches(self._waiting, schema=self._schema)
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)
        self._waiting = []
