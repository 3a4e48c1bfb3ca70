"""Opens a table file with the reader of its format."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from clipfilter_wds.tables.formats.csv import TAB_FIRST, CsvReader
from clipfilter_wds.tables.formats.json import JsonArrayReader, JsonLinesReader
from clipfilter_wds.tables.formats.rows import TableReader, Wanted


def _open_parquet(file: BinaryIO, wanted: Wanted) -> TableReader:
    from clipfilter_wds.tables.formats.parquet import ParquetReader  # a config needs the suffixes, and no pyarrow

    return ParquetReader(file, wanted)


_READERS: dict[str, Callable[[BinaryIO, Wanted], TableReader]] = {
    ".jsonl": JsonLinesReader,
    ".csv": CsvReader,
    ".tsv": partial(CsvReader, delimiters=TAB_FIRST),
    ".parquet": _open_parquet,
    ".json": JsonArrayReader,
}

#: What a table's name may end with.
SUFFIXES = tuple(_READERS)


@contextmanager
def open_table(path: Path, wanted: Wanted) -> Iterator[TableReader]:
    """Open a table file by its suffix, one of :data:`SUFFIXES`.

    Raises:
        ValueError: When it is no table of that format or lacks a wanted column.
    """
    with path.open("rb") as file:
        try:
            reader = _READERS[path.suffix.lower()](file, wanted)
        except ValueError as error:
            raise ValueError(f"can't use {str(path)!r}: {error}") from error
        yield reader
