"""What every type of table file offers: rows to read a run at a time, and a file of the same type to write some to."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Protocol

import numpy as np

from clipfilter_wds.tables.formats.json_lines import BadLines


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a table.

    Attributes:
        image_key: Column of the images.
        caption_key: Column of the captions.
        score_key: Column to add, None for none.
        num_rows: Most rows of a run.
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
        there = f"the table's columns are {', '.join(map(repr, columns))}"
        for parameter, key in (("image_key", self.image_key), ("caption_key", self.caption_key)):
            if key not in columns:
                raise ValueError(f"{parameter} is {key!r}, but {there}")
        if self.score_key in columns:
            raise ValueError(f"score_key is {self.score_key!r}, but there is such a column; choose another name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A run of rows: as their file holds them (of a type that only the file's own writer knows), and their cells."""

    stored: Any
    images: Sequence[object]
    captions: Sequence[object]


class TableWriter(Protocol):
    """Writes kept rows, as they were, to a file of the type that they came from."""

    def write(self, rows: Rows, keep: np.ndarray, similarity: np.ndarray) -> None:
        """Write those of ``rows`` that ``keep`` (bool ``[N]``) marks; ``similarity`` is float32 ``[N]``."""

    def finish(self) -> None:
        """Write what comes after the last row."""


class TableReader(Protocol):
    """An open table file."""

    #: What was passed over, so far.
    bad_lines: BadLines

    def read(self) -> Iterator[Rows]:
        """Yield all rows, in order."""

    def done(self) -> float:
        """The share of the file that was read, 0 to 1."""

    def writer(self, file: BinaryIO) -> TableWriter:
        """A writer of tables with these columns, and that of the score if it is wanted."""


@dataclass(kw_only=True)
class RowsBuilder:
    """Gathers rows until they are a run."""

    stored: list[Any] = field(default_factory=list)
    images: list[object] = field(default_factory=list)
    captions: list[object] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.stored)

    def add(self, stored: Any, image: object, caption: object) -> None:
        """Add a row."""
        self.stored.append(stored)
        self.images.append(image)
        self.captions.append(caption)

    def build(self) -> Rows:
        """The rows that were added."""
        return Rows(stored=self.stored, images=self.images, captions=self.captions)
