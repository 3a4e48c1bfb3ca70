"""Writes the rows of a table to a file of another type."""

import json
import tempfile
from collections.abc import Callable, Iterator
from itertools import compress
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from clipfilter_wds.tables.formats.csv import csv_line
from clipfilter_wds.tables.formats.json import json_array_writer, json_lines_writer
from clipfilter_wds.tables.formats.json_lines import dump_record
from clipfilter_wds.tables.formats.rows import Record, Rows, TableReader, TableWriter


def converting_writer(reader: TableReader, file: BinaryIO, suffix: str, score_key: str | None) -> TableWriter:
    """A writer of a table of another type than the reader's.

    Args:
        reader: Gives the rows.
        file: Where to write.
        suffix: That of the type: .jsonl, .json, .csv, .tsv or .parquet.
        score_key: Column to add, None for none.
    """
    if suffix == ".jsonl":
        return _JsonConverter(reader, json_lines_writer(file, None), score_key)
    if suffix == ".json":
        return _JsonConverter(reader, json_array_writer(file, None), score_key)
    return _ColumnConverter(reader, file, _write_parquet if suffix == ".parquet" else _CSV_WRITERS[suffix], score_key)


class _JsonConverter:
    def __init__(self, reader: TableReader, writer: Any, score_key: str | None) -> None:
        self._reader, self._writer, self._score_key = reader, writer, score_key

    def write(self, rows: Rows, keep: np.ndarray, similarity: np.ndarray) -> None:
        for record in _kept(self._reader, rows, keep, similarity, self._score_key):
            self._writer.write_line(dump_record(record))

    def finish(self) -> None:
        self._writer.finish()

    def close(self) -> None:
        pass


#: Yields the records, as often as it is called.
_ReadRecords = Callable[[], Iterator[Record]]


class _ColumnConverter:
    """Collects the rows in a file without a name, since all rows must be seen to know the columns and their types.

    It lies where the output does: the folder of temporary files may be small, or in memory.
    """

    def __init__(
        self,
        reader: TableReader,
        file: BinaryIO,
        write: Callable[[BinaryIO, list[str], _ReadRecords], None],
        score_key: str | None,
    ) -> None:
        self._reader, self._file, self._write, self._score_key = reader, file, write, score_key
        self._columns = dict.fromkeys(reader.columns)
        self._spool: IO[bytes] = tempfile.TemporaryFile(dir=Path(file.name).parent)  # noqa: SIM115  # close closes it

    def write(self, rows: Rows, keep: np.ndarray, similarity: np.ndarray) -> None:
        for record in _kept(self._reader, rows, keep, similarity, self._score_key):
            self._columns.update(dict.fromkeys(record))
            # Half a surrogate pair, which JSON can hold, has no place in other files.
            line = json.dumps(record, ensure_ascii=False).encode(errors="replace")
            self._spool.write(line + b"\n")

    def finish(self) -> None:
        columns = [column for column in self._columns if column != self._score_key]
        if self._score_key is not None:
            columns.append(self._score_key)

        def read() -> Iterator[Record]:
            self._spool.seek(0)
            return map(json.loads, self._spool)

        self._write(self._file, columns, read)

    def close(self) -> None:
        self._spool.close()


def _kept(
    reader: TableReader, rows: Rows, keep: np.ndarray, similarity: np.ndarray, score_key: str | None
) -> Iterator[Record]:
    for record, score in compress(zip(reader.records(rows), similarity.tolist(), strict=True), keep):
        yield record if score_key is None else {**record, score_key: score}


def _write_csv(file: BinaryIO, columns: list[str], read: _ReadRecords, delimiter: str) -> None:
    file.write(csv_line([_utf8(column) for column in columns], delimiter).encode() + b"\n")
    for record in read():
        cells = [_cell(record.get(column)) for column in map(_utf8, columns)]
        file.write(csv_line(cells, delimiter).encode() + b"\n")


def _cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _utf8(text: str) -> str:
    return text.encode(errors="replace").decode()


def _write_parquet(file: BinaryIO, columns: list[str], read: _ReadRecords) -> None:
    from clipfilter_wds.tables.formats.records import write_records  # a config needs the suffixes, and no pyarrow

    write_records(file, list(map(_utf8, columns)), read)


_CSV_WRITERS: dict[str, Callable[[BinaryIO, list[str], _ReadRecords], None]] = {
    ".csv": lambda file, columns, read: _write_csv(file, columns, read, ","),
    ".tsv": lambda file, columns, read: _write_csv(file, columns, read, "\t"),
}
