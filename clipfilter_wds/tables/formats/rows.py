"""Defines what every table format offers: reading rows in runs, and writing some of them to a file of that format."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Protocol

import numpy as np

from clipfilter_wds.tables.formats.json_lines import BadLines


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to read from a table, and what to add to it.

    Attributes:
        image_key: Column of the images.
        caption_key: Column of the captions.
        score_key: Column to add, None for none.
        num_rows: Rows per run.
    """

    image_key: str
    caption_key: str
    score_key: str | None
    num_rows: int

    def check(self, columns: Sequence[str]) -> None:
        """Check that a table has the columns to read and not the one to add.

        Raises:
            ValueError: When not, naming the columns that it has.
        """
        found = f"the table's columns are {', '.join(map(repr, columns))}"
        for parameter, key in (("image_key", self.image_key), ("caption_key", self.caption_key)):
            if key not in columns:
                raise ValueError(f"{parameter} is {key!r}, but {found}")
        if self.score_key in columns:
            raise ValueError(f"score_key is {self.score_key!r}, but there is such a column; choose another name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A run of rows.

    Attributes:
        stored: The rows as their file holds them, in a form that only the writer of that format reads.
        images: The cells of the image column.
        captions: The cells of the caption column.
    """

    stored: Any
    images: Sequence[object]
    captions: Sequence[object]


class TableWriter(Protocol):
    """Writes kept rows, unchanged, to a file of the format that they came from."""

    def write(self, rows: Rows, keep: np.ndarray, similarity: np.ndarray) -> None:
        """Write those of ``rows`` that ``keep`` (bool ``[N]``) marks; ``similarity`` is float32 ``[N]``."""

    def finish(self) -> None:
        """Write what follows the last row."""

    def close(self) -> None:
        """Let go of what it holds, before the file is closed; whether or not it was finished."""


#: A row with its columns by name, ready for JSON.
Record = dict[str, Any]


class TableReader(Protocol):
    """An open table file."""

    #: The lines that were passed over so far.
    bad_lines: BadLines

    #: The columns; of JSON, those that were seen so far.
    columns: list[str]

    def read(self) -> Iterator[Rows]:
        """Yield all rows in order, in runs."""

    def done(self) -> float:
        """The share of the file that has been read, 0 to 1."""

    def obstacle(self) -> str | None:
        """Why its rows can't be in a table of another type; None when they can."""

    def records(self, rows: Rows) -> list[Record]:
        """The rows for a table of another type."""

    def writer(self, file: BinaryIO) -> TableWriter:
        """A writer of tables with the same columns, plus that of the score if it is wanted."""


def in_runs(records: Iterable[tuple[Any, object, object]], num_rows: int) -> Iterator[Rows]:
    """Gather records (as their file holds them, image, caption) into runs of ``num_rows``; the last may be shorter."""
    records = iter(records)
    while run := list(islice(records, num_rows)):
        stored, images, captions = zip(*run, strict=True)
        yield Rows(stored=stored, images=images, captions=captions)


def duplicate_column(columns: Sequence[str]) -> str | None:
    """That several columns have one name, for :meth:`TableReader.obstacle`."""
    repeated = [column for column in dict.fromkeys(columns) if columns.count(column) > 1]
    return f"{columns.count(repeated[0])} columns are called {repeated[0]!r}" if repeated else None
