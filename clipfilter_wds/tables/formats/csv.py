"""Reads and writes tables of separated values, CSV and TSV."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from clipfilter_wds.tables.formats.json_lines import BadLines
from clipfilter_wds.tables.formats.rows import Record, Rows, TableWriter, Wanted, duplicate_column, in_runs

#: A longer line is passed over, and so is a row with a longer cell.
_MAX_LINE_CHARACTERS = _MAX_CELL_CHARACTERS = 1 << 24
# Bytes that are not UTF-8 pass through unchanged.
_ERRORS = "surrogateescape"

#: What may be between cells; in a .csv commas are tried first, in a .tsv tabs.
COMMA_FIRST, TAB_FIRST = ",\t;|", "\t,;|"


class CsvReader:
    """Reads separated values in UTF-8 with a header. Kept rows are written byte for byte.

    Args:
        file: The open file.
        wanted: What to read and add.
        delimiters: What may be between the cells. The first with which the header has the wanted columns is.

    Raises:
        ValueError: When there is no header, or it lacks a wanted column.
    """

    def __init__(self, file: BinaryIO, wanted: Wanted, delimiters: str = COMMA_FIRST) -> None:
        self.bad_lines = BadLines()
        self._file, self._wanted, self._size = file, wanted, max(1, os.fstat(file.fileno()).st_size)
        csv.field_size_limit(_MAX_CELL_CHARACTERS)  # the module's own limit, 131072, is less than some pages of text
        self._lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors=_ERRORS, newline=""))
        self._header = self._read_header()
        self._delimiter, self.columns = _split_header(self._header, wanted, delimiters)
        self._cells = csv.reader(self._lines, delimiter=self._delimiter)
        wanted.check(self.columns)

    def _read_header(self) -> str:
        records = csv.reader(self._lines)
        try:
            while next(records, None) == []:  # a blank line
                self._lines.take()
        except csv.Error as error:
            raise ValueError(f"its first line names no columns: {error}") from error
        header = self._lines.take()
        if "\0" in header:
            raise ValueError("it is in UTF-16 or no text; save it as UTF-8")
        if not header.strip():
            raise ValueError("it is empty; the first line must name the columns")
        return header

    def read(self) -> Iterator[Rows]:
        """See :class:`TableReader`."""
        image, caption = (self.columns.index(key) for key in (self._wanted.image_key, self._wanted.caption_key))
        return in_runs(
            ((stored, cells[image], cells[caption]) for stored, cells in self._records()), self._wanted.num_rows
        )

    def _records(self) -> Iterator[tuple["_Stored", list[str]]]:
        """Yield each record, and its cells with those filled in that it lacks."""
        while True:
            first = self._lines.num_read + 1
            try:
                cells = next(self._cells, None)
                problem = self._problem(cells)
            except csv.Error as error:
                cells, problem = [], str(error)
            text = self._lines.take()
            if problem:
                last = self._lines.num_read
                where = f"line {first}" if first == last else f"lines {first} to {last}"
                self.bad_lines.add(where, problem, last - first + 1)
            elif cells:
                num_missing = len(self.columns) - len(cells)
                cells += [""] * num_missing
                yield _Stored(text, num_missing, cells), cells
            if cells is None:
                return

    def _problem(self, cells: list[str] | None) -> str | None:
        if cells and self._lines.ended:
            return "its quote is never closed"
        if cells and len(cells) > len(self.columns):
            return f"it has {len(cells)} cells; the header names {len(self.columns)} columns"
        return None

    def done(self) -> float:
        """See :class:`TableReader`."""
        return self._file.tell() / self._size

    def obstacle(self) -> str | None:
        """See :class:`TableReader`."""
        return duplicate_column(self.columns)

    def records(self, rows: Rows) -> list[Record]:
        """See :class:`TableReader`."""
        return [dict(zip(self.columns, map(_clean, stored.cells), strict=True)) for stored in rows.stored]

    def writer(self, file: BinaryIO) -> TableWriter:
        """See :class:`TableReader`."""
        return _CsvWriter(file, self._header, self._wanted.score_key, self._delimiter)


def _split_header(header: str, wanted: Wanted, delimiters: str) -> tuple[str, list[str]]:
    """What is between the cells, and the columns."""
    splits = [(delimiter, next(csv.reader(io.StringIO(header), delimiter=delimiter))) for delimiter in delimiters]
    for delimiter, columns in splits:
        if {wanted.image_key, wanted.caption_key} <= set(columns):
            return delimiter, columns
    return max(splits, key=lambda split: len(split[1]))


def _clean(cell: str) -> str:
    """The cell with a mark in place of each byte that is not UTF-8."""
    return cell.encode(errors=_ERRORS).decode(errors="replace")


class _Stored(NamedTuple):
    """A record: its text, how many cells that lacks, and all its cells."""

    text: str
    num_missing: int
    cells: list[str]


class _Lines:
    """Hands lines to the csv module, and keeps the lines of the record that it is reading."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream
        self._taken: list[str] = []
        self.ended = False
        self.num_read = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(_MAX_LINE_CHARACTERS)
        if not line:
            self.ended = True
            raise StopIteration
        self.num_read += 1
        if len(line) == _MAX_LINE_CHARACTERS and line[-1] not in "\r\n":
            self._skip_rest()
            raise csv.Error(f"it is longer than {_MAX_LINE_CHARACTERS:,} characters")
        self._taken.append(line)
        return line

    def _skip_rest(self) -> None:
        """Pass over what is left of a line of which only a part was read."""
        while (rest := self._stream.readline(_MAX_LINE_CHARACTERS)) and rest[-1] not in "\r\n":
            pass

    def take(self) -> str:
        """The text of the record that was just read."""
        text, self._taken = "".join(self._taken), []
        return text


class _CsvWriter:
    def __init__(self, file: BinaryIO, header: str, score_key: str | None, delimiter: str) -> None:
        self._file, self._has_score, self._delimiter = file, score_key is not None, delimiter
        self._line_end = header[len(header.rstrip("\r\n")) :] or "\n"
        self._write(header, 0, "" if score_key is None else csv_line([score_key], delimiter))

    def write(self, rows: Rows, keep: np.ndarray, similarity: np.ndarray) -> None:
        for row in np.flatnonzero(keep):
            stored = rows.stored[row]
            self._write(stored.text, stored.num_missing, repr(float(similarity[row])))

    def _write(self, text: str, num_missing: int, cell: str) -> None:
        body = text.rstrip("\r\n")
        line_end = text[len(body) :] or self._line_end  # the last row may have none
        added = self._delimiter * (num_missing + 1) + cell if self._has_score else ""
        self._file.write(f"{body}{added}{line_end}".encode(errors=_ERRORS))

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def csv_line(cells: Sequence[str], delimiter: str) -> str:
    """A line without its end."""
    buffer = io.StringIO()
    # With this line end the module quotes both of its characters, wherever they are.
    csv.writer(buffer, delimiter=delimiter, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().removesuffix("\r\n")
