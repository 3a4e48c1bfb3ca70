"""Reads and writes tables of JSON objects: one per line, or all in one array."""

import math
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

import numpy as np

from clipfilter_wds.tables.formats.json_lines import BadLines, Record, dump_record, load_json, read_json_lines
from clipfilter_wds.tables.formats.rows import Rows, TableWriter, Wanted, in_runs

#: How many rows may be read to learn which columns there are.
_MAX_PEEKED = 1000


class JsonLinesReader:
    """Reads JSON lines. Kept lines are written byte for byte, with the score at their ends if one is added.

    Args:
        file: The open file.
        wanted: What to read and add.

    Raises:
        ValueError: When no line is a JSON object, or none of the first thousand has a wanted column.
    """

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        self.bad_lines = BadLines()
        self._file, self._wanted, self._size = file, wanted, max(1, os.fstat(file.fileno()).st_size)
        self.columns, self._records = _peek(read_json_lines(file, self.bad_lines), wanted, self.bad_lines)

    def read(self) -> Iterator[Rows]:
        """See :class:`TableReader`."""
        return _rows_of(self._records, self._wanted)

    def obstacle(self) -> str | None:
        """See :class:`TableReader`."""
        return None

    def records(self, rows: Rows) -> list[Record]:
        """See :class:`TableReader`."""
        return [record for _, record in rows.stored]

    def done(self) -> float:
        """See :class:`TableReader`."""
        return self._file.tell() / self._size

    def writer(self, file: BinaryIO) -> TableWriter:
        """See :class:`TableReader`."""
        return json_lines_writer(file, self._wanted.score_key)


class JsonArrayReader:
    """Reads an array of JSON objects, which is held in memory.

    Args:
        file: The open file.
        wanted: What to read and add.

    Raises:
        ValueError: When it is no array, or none of the first thousand objects has a wanted column.
    """

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        self.bad_lines = BadLines()
        array = load_json(file.read())
        if not isinstance(array, list):
            raise ValueError(
                f"it holds a {type(array).__name__}, not an array of objects; for JSON lines, name it .jsonl"
            )
        self._wanted, self._num_read, self._num_records = wanted, 0, max(1, len(array))
        self.columns, self._records = _peek(self._objects(array), wanted, self.bad_lines)

    def _objects(self, array: list[object]) -> Iterator[tuple[bytes, Record]]:
        for self._num_read, record in enumerate(array, 1):
            if isinstance(record, dict):
                yield dump_record(record), record
            else:
                self.bad_lines.add(f"element {self._num_read}", f"it is a {type(record).__name__}, not an object")

    def read(self) -> Iterator[Rows]:
        """See :class:`TableReader`."""
        return _rows_of(self._records, self._wanted)

    def obstacle(self) -> str | None:
        """See :class:`TableReader`."""
        return None

    def records(self, rows: Rows) -> list[Record]:
        """See :class:`TableReader`."""
        return [record for _, record in rows.stored]

    def done(self) -> float:
        """See :class:`TableReader`."""
        return self._num_read / self._num_records

    def writer(self, file: BinaryIO) -> TableWriter:
        """See :class:`TableReader`."""
        return json_array_writer(file, self._wanted.score_key)


def _peek(
    records: Iterator[tuple[bytes, Record]], wanted: Wanted, bad_lines: BadLines
) -> tuple[list[str], Iterable[tuple[bytes, Record]]]:
    """Check a table's columns by its first records; those columns, and all its records, the first ones included."""
    head: list[tuple[bytes, Record]] = []
    columns: dict[str, None] = {}
    for line, record in records:
        head.append((line, record))
        columns.update(dict.fromkeys(record))
        if len(head) == _MAX_PEEKED or {wanted.image_key, wanted.caption_key} <= columns.keys():
            break
    if head:
        wanted.check(list(columns))
    elif bad_lines.count:
        raise ValueError(f"there is no JSON object in it ({bad_lines})")
    return list(columns), chain(head, records)


def _rows_of(records: Iterable[tuple[bytes, Record]], wanted: Wanted) -> Iterator[Rows]:
    """Gather records into runs; a cell is None where a record lacks the column."""
    stored_and_cells = (
        ((line, record), record.get(wanted.image_key), record.get(wanted.caption_key)) for line, record in records
    )
    return in_runs(stored_and_cells, wanted.num_rows)


def json_lines_writer(file: BinaryIO, score_key: str | None) -> "_JsonWriter":
    """Writes an object per line."""
    return _JsonWriter(file, score_key, begin=b"", between=b"\n", end=b"\n", empty=b"")


def json_array_writer(file: BinaryIO, score_key: str | None) -> "_JsonWriter":
    """Writes an array of objects, one per line."""
    return _JsonWriter(file, score_key, begin=b"[\n", between=b",\n", end=b"\n]\n", empty=b"[]\n")


def _with_cell(line: bytes, record: Record, key: str, value: float | None) -> bytes:
    """An object's line with a key added, all else as it stands: numbers and text can be written in several ways."""
    if key in record:
        return dump_record({**record, key: value})
    return line[:-1].rstrip() + (b", " if record else b"") + dump_record({key: value})[1:]


class _JsonWriter:
    def __init__(
        self, file: BinaryIO, score_key: str | None, *, begin: bytes, between: bytes, end: bytes, empty: bytes
    ) -> None:
        self._file, self._score_key = file, score_key
        self._before, self._between, self._end, self._empty = begin, between, end, empty
        self._is_empty = True

    def write(self, rows: Rows, keep: np.ndarray, similarity: np.ndarray) -> None:
        for row in np.flatnonzero(keep):
            line, record = rows.stored[row]
            if self._score_key is not None:
                score = float(similarity[row])
                line = _with_cell(line, record, self._score_key, None if math.isnan(score) else score)
            self.write_line(line)

    def write_line(self, line: bytes) -> None:
        """Write an object."""
        self._file.write(self._before + line)
        self._before, self._is_empty = self._between, False

    def finish(self) -> None:
        self._file.write(self._empty if self._is_empty else self._end)

    def close(self) -> None:
        pass
