"""Reads and writes CSV tables."""

import csv
import io
import os
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from clipfilter_wds.tables.formats.json_lines import BadLines
from clipfilter_wds.tables.formats.rows import Rows, TableWriter, Wanted, in_runs

_MAX_CELL_CHARACTERS = 1 << 24
# Bytes that are not UTF-8 pass through unchanged.
_ERRORS = "surrogateescape"


class CsvReader:
    """Reads comma-separated values in UTF-8 with a header. Kept rows are written byte for byte.

    Args:
        file: The open file.
        wanted: What to read and add.

    Raises:
        ValueError: When there is no header, or it lacks a wanted column.
    """

    def __init__(self, file: BinaryIO, wanted: Wanted) -> None:
        self.bad_lines = BadLines()
        self._file, self._wanted, self._size = file, wanted, max(1, os.fstat(file.fileno()).st_size)
        csv.field_size_limit(_MAX_CELL_CHARACTERS)  # the module's own limit, 131072, is less than some pages of text
        self._lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors=_ERRORS, newline=""))
        self._cells = csv.reader(self._lines)
        self._columns = next(self._cells, [])
        self._header = self._lines.take()
        if not self._columns:
            raise ValueError("it is empty; the first line must name the columns")
        wanted.check(self._columns)

    def read(self) -> Iterator[Rows]:
        """See :class:`TableReader`."""
        image, caption = (self._columns.index(key) for key in (self._wanted.image_key, self._wanted.caption_key))
        return in_runs(
            ((stored, cells[image], cells[caption]) for stored, cells in self._records()), self._wanted.num_rows
        )

    def _records(self) -> Iterator[tuple[tuple[str, int], list[str]]]:
        """Yield each record's text with the number of cells that it lacks, and its cells with those filled in."""
        while True:
            first_line = self._cells.line_num + 1
            try:
                cells = next(self._cells, None)
                problem = self._problem(cells)
            except csv.Error as error:
                cells, problem = [], str(error)
            text = self._lines.take()
            if problem:
                self.bad_lines.add(f"line {first_line}", problem)
            elif cells:
                num_missing = len(self._columns) - len(cells)
                yield (text, num_missing), cells + [""] * num_missing
            if cells is None:
                return

    def _problem(self, cells: list[str] | None) -> str | None:
        if cells and self._lines.ended:
            return "its quote is never closed"
        if cells and len(cells) > len(self._columns):
            return f"it has {len(cells)} cells; the header names {len(self._columns)} columns"
        return None

    def done(self) -> float:
        """See :class:`TableReader`."""
        return self._file.tell() / self._size

    def writer(self, file: BinaryIO) -> TableWriter:
        """See :class:`TableReader`."""
        return _CsvWriter(file, self._header, self._wanted.score_key)


class _Lines:
    """Hands lines to the csv module, and keeps the lines of the record that it is reading."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream
        self._taken: list[str] = []
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(_MAX_CELL_CHARACTERS)
        if not line:
            self.ended = True
            raise StopIteration
        self._taken.append(line)
        return line

    def take(self) -> str:
        """The text of the record that was just read."""
        text, self._taken = "".join(self._taken), []
        return text


class _CsvWriter:
    def __init__(self, file: BinaryIO, header: str, score_key: str | None) -> None:
        self._file, self._has_score = file, score_key is not None
        self._line_end = header[len(header.rstrip("\r\n")) :] or "\n"
        self._write(header, 0, "" if score_key is None else _quoted(score_key))

    def write(self, rows: Rows, keep: np.ndarray, similarity: np.ndarray) -> None:
        for row in np.flatnonzero(keep):
            text, num_missing = rows.stored[row]
            self._write(text, num_missing, repr(float(similarity[row])))

    def _write(self, text: str, num_missing: int, cell: str) -> None:
        body = text.rstrip("\r\n")
        line_end = text[len(body) :] or self._line_end  # the last row may have none
        added = "," * num_missing + "," + cell if self._has_score else ""
        self._file.write(f"{body}{added}{line_end}".encode(errors=_ERRORS))

    def finish(self) -> None:
        pass


def _quoted(cell: str) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow([cell])
    return buffer.getvalue()
