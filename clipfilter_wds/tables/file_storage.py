"""Stores a pipeline's tables, one file per step, for operators that run without DataFlow."""

import copy
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self, get_args
from warnings import catch_warnings

from clipfilter_wds.storage.publish import publish
from clipfilter_wds.tables.formats.json_lines import BadLines, dump_record, load_json, read_json_lines
from clipfilter_wds.tables.formats.rows import duplicate_column

if TYPE_CHECKING:
    import pandas as pd

CacheType = Literal["json", "jsonl", "csv", "parquet"]

_ROWS_AT_A_TIME = 10_000
#: From here on, float64 does not hold every whole number, and int64 none.
_EXACT, _TOO_LARGE = 2.0**53, 2.0**63

_logger = logging.getLogger(__name__)


class FileStorage:
    """Reads each step's table from one file and writes the next step's to another, as DataFlow's ``FileStorage`` does.

    Step 0 is the file that a pipeline begins with; the operator of step ``n`` writes
    ``{cache_path}/{file_name_prefix}_step{n + 1}.{cache_type}``.

    Unlike DataFlow's, files are whole or absent, values come back as they are in the file (no string becomes a number
    or a date, ``None`` and ``NA`` in a CSV are text), and lines of a jsonl that are no JSON objects are passed over and
    logged. Needs pandas: ``pip install 'clipfilter-wds[dataflow]'``.

    Args:
        first_entry_file_name: The first file; its suffix tells the format.
        cache_path: Folder of the files that are written.
        file_name_prefix: Beginning of their names.
        cache_type: Their format: ``json``, ``jsonl``, ``csv`` or ``parquet``.

    Raises:
        ModuleNotFoundError: When pandas is not installed.
        ValueError: When ``cache_type`` is none of these.
    """

    def __init__(
        self,
        first_entry_file_name: str,
        cache_path: str = "./cache",
        file_name_prefix: str = "dataflow_cache",
        cache_type: CacheType = "jsonl",
    ) -> None:
        _import_pandas()
        self.first_entry_file_name = first_entry_file_name
        self.cache_path = cache_path
        self.file_name_prefix = file_name_prefix
        self.cache_type = _check_type(cache_type, "cache_type")
        self.operator_step = -1

    def step(self) -> Self:
        """Begin the next step; the storage at that step, for one operator to use."""
        self.operator_step += 1
        return copy.copy(self)

    def reset(self) -> Self:
        """Return to before the first step."""
        self.operator_step = -1
        return self

    def read(self, output_type: Literal["dataframe", "dict"] = "dataframe") -> Any:
        """Read the table of this step, as a pandas ``DataFrame`` or a list with a dict per row.

        Raises:
            FileNotFoundError: When its file isn't there.
            ValueError: When the file isn't of the format that its suffix names, or is a pickle.
            RuntimeError: When no step has begun.
        """
        if output_type not in ("dataframe", "dict"):
            raise ValueError(f"output_type is {output_type!r}; use 'dataframe' or 'dict'")
        path = self._path(self.operator_step)
        dataframe = _read(path, _check_type(path.suffix.removeprefix(".").lower(), str(path)))
        return dataframe if output_type == "dataframe" else dataframe.to_dict(orient="records")

    def write(self, data: "pd.DataFrame | list[dict[str, Any]]") -> str:
        """Write the table that the next step reads, whole or not at all.

        Returns:
            The path of the file.

        Raises:
            TypeError: When ``data`` is neither a ``DataFrame`` nor a list of dicts.
            RuntimeError: When no step has begun.
        """
        pandas = _import_pandas()
        if isinstance(data, list) and all(isinstance(row, dict) for row in data):
            data = pandas.DataFrame(data)
        if not isinstance(data, pandas.DataFrame):
            raise TypeError(f"data is a {type(data).__name__}; give a DataFrame or a list of dicts")
        self._path(self.operator_step)  # before the first step, the next file would be the input itself
        path = self._path(self.operator_step + 1)
        with publish(path) as file:
            _write(data, file, self.cache_type)
        return str(path)

    def _path(self, step: int) -> Path:
        if step < 0:
            raise RuntimeError("no step has begun; call storage.step() and hand what it returns to an operator")
        if step == 0:
            return Path(self.first_entry_file_name)
        return Path(self.cache_path) / f"{self.file_name_prefix}_step{step}.{self.cache_type}"


def _check_type(file_type: str, where: str) -> CacheType:
    if file_type in ("pickle", "pkl"):
        raise ValueError(
            f"{where}: a pickle can run any code when it is read, so it is never read or written here; "
            "save the table as parquet"
        )
    if file_type not in get_args(CacheType):
        raise ValueError(f"{where}: {file_type!r} is no table format; use {', '.join(get_args(CacheType))}")
    return file_type  # type: ignore[return-value]  # mypy does not narrow by get_args


def _read(path: Path, file_type: CacheType) -> "pd.DataFrame":
    pandas = _import_pandas()
    with path.open("rb") as file:
        try:
            if file_type == "parquet":
                return pandas.read_parquet(file)
            if file_type == "csv":
                return _read_csv(file)
            if file_type == "json":
                return _dataframe(_records_of(file.read()))
            return _read_jsonl(path, file)
        except pandas.errors.EmptyDataError:
            return pandas.DataFrame()
        except ValueError as error:
            raise ValueError(f"can't read {str(path)!r} as {file_type}: {error}") from error


def _read_csv(file: BinaryIO) -> "pd.DataFrame":
    pandas = _import_pandas()
    # Where the first row has a cell too many, pandas would take the first ones for an index, and move all others.
    options = {"keep_default_na": False, "na_values": [""], "index_col": False}
    try:
        with catch_warnings(action="error", category=pandas.errors.ParserWarning):
            dataframe = pandas.read_csv(file, **options)
    except pandas.errors.ParserWarning:
        raise ValueError("its first row has more cells than the header") from None
    for column in _inexact(dataframe):
        if dataframe[column].abs().max() >= _TOO_LARGE:
            continue
        file.seek(0)
        with suppress(ValueError, TypeError, OverflowError):  # of what is no whole number
            dataframe[column] = pandas.read_csv(file, usecols=[column], dtype="Int64", **options)[column]
    return dataframe


def _dataframe(records: Any) -> "pd.DataFrame":
    """The table of an array of objects, or of an object of columns."""
    pandas = _import_pandas()
    dataframe = pandas.DataFrame(records)
    for column in _inexact(dataframe) if isinstance(records, list) else ():
        cells = [record.get(column) for record in records]
        if all(cell is None or isinstance(cell, int) for cell in cells):
            is_large = any(abs(cell) >= 1 << 63 for cell in cells if cell is not None)
            dataframe[column] = pandas.array(cells, dtype=object if is_large else "Int64")
    return dataframe


def _inexact(dataframe: "pd.DataFrame") -> list[Any]:
    """Columns that may be of whole numbers too large for float64, which pandas makes of them where some are missing."""
    floats = dataframe.select_dtypes("float64")
    return [name for name in floats.columns if (floats[name].abs() >= _EXACT).any() and floats[name].isna().any()]


def _read_jsonl(path: Path, file: BinaryIO) -> "pd.DataFrame":
    bad = BadLines()
    records = [_parse(line) if _may_hold_surrogates(line) else record for line, record in read_json_lines(file, bad)]
    if bad.count and not records:
        raise ValueError(f"no line is a JSON object ({bad})")
    if bad.count:
        _logger.warning("passed over %s lines of %s that are no JSON objects (%s)", f"{bad.count:,}", path, bad)
    return _dataframe(records)


def _records_of(text: bytes) -> Any:
    """What a ``.json`` holds: an array of objects, or, as pandas writes them too, an object of columns."""
    parsed = _parse(text)
    is_array = isinstance(parsed, list) and all(isinstance(row, dict) for row in parsed)
    if not is_array and not isinstance(parsed, dict):
        raise ValueError("it holds no array of objects")
    return parsed


def _parse(text: bytes) -> Any:
    """Parse JSON and replace halves of surrogate pairs: pandas can't hold a table that has one."""
    parsed = load_json(text)
    if _may_hold_surrogates(text):
        parsed = json.loads(json.dumps(parsed, ensure_ascii=False).encode("utf-8", errors="replace"))
    return parsed


def _may_hold_surrogates(text: bytes) -> bool:
    return b"\\ud" in text or b"\\uD" in text


def _write(dataframe: "pd.DataFrame", file: BinaryIO, file_type: CacheType) -> None:
    if file_type != "parquet":
        _check_no_bytes(dataframe, file_type)
    if file_type == "parquet":
        dataframe.to_parquet(file, index=False)
    elif file_type == "csv":
        dataframe.to_csv(file, index=False)
    elif file_type == "jsonl":
        file.writelines(line + b"\n" for line in _json_rows(dataframe))
    else:
        file.write(b"[" + b",".join(b"\n  " + line for line in _json_rows(dataframe)) + b"\n]\n")


def _json_rows(dataframe: "pd.DataFrame") -> Iterator[bytes]:
    if repeated := duplicate_column(list(map(str, dataframe.columns))):
        raise ValueError(f"{repeated}, and an object has one of a name; rename them")
    # Not pandas' to_json, which rounds numbers to 15 digits at best.
    for start in range(0, len(dataframe), _ROWS_AT_A_TIME):
        rows = dataframe.iloc[start : start + _ROWS_AT_A_TIME].astype(object)
        for record in rows.where(rows.notna(), None).to_dict(orient="records"):
            yield dump_record({str(column): value for column, value in record.items()}, default=_json_value)


def _check_no_bytes(dataframe: "pd.DataFrame", file_type: CacheType) -> None:
    for name, column in dataframe.items():
        if column.dtype.kind == "O" and any(map(_holds_bytes, column)):
            raise ValueError(
                f"column {name!r} holds bytes, which {file_type} can't; give FileStorage cache_type='parquet'"
            )


def _holds_bytes(cell: Any) -> bool:
    if isinstance(cell, dict):
        return any(map(_holds_bytes, cell.values()))
    if isinstance(cell, list | tuple) or hasattr(cell, "dtype"):
        return hasattr(cell, "__iter__") and any(map(_holds_bytes, cell))
    return isinstance(cell, bytes | bytearray | memoryview)


def _json_value(value: Any) -> Any:
    """Convert what JSON lacks: numpy arrays to lists, numpy numbers to numbers, dates to ISO text, the rest to text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _import_pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tables in memory need pandas ({error}): pip install 'clipfilter-wds[dataflow]'", name=error.name
        ) from None
    return pandas
