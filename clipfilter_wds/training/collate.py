"""Makes columns of the views of samples: what is a list has a row for each sample, what is a tuple holds columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate


def collate(views: Sequence[Any]) -> Any:
    """The views of some samples as a column, as torch collates them; of views of several parts, a tuple of columns.

    torch makes a list of these columns, which nobody could tell from a list of rows.
    """
    return _with_tuples(default_collate(list(views)), views[0]) if views else []


def _with_tuples(column: Any, view: Any) -> Any:
    if isinstance(view, Mapping):
        return {name: _with_tuples(column[name], part) for name, part in view.items()}
    if _is_sequence(view):
        return tuple_like(view, (_with_tuples(each, part) for each, part in zip(column, view, strict=True)))
    return list(column) if isinstance(column, tuple) else column  # as torch collates the texts of tuples


class ColumnReader:
    """Reads the columns of another loader's batches, where a list may hold rows or, as torch collates, columns.

    One that could be either holds what the lists of that name held before; rows, where none came before.
    """

    def __init__(self) -> None:
        self._of_columns: set[str] = set()  # the names of lists that hold columns

    def read(self, columns: Mapping[str, Any], num_rows: int) -> dict[str, Any]:
        """The columns of a batch; those that hold columns are tuples.

        Raises:
            ValueError: When one has another number of rows.
            TypeError: When one can have no rows.
        """
        return {name: self._read(str(name), column, num_rows) for name, column in columns.items()}

    def _read(self, name: str, column: Any, num_rows: int) -> Any:
        if isinstance(column, Mapping):
            return {key: self._read(f"{name}.{key}", part, num_rows) for key, part in column.items()}
        if not _is_sequence(column):
            if not isinstance(column, torch.Tensor | np.ndarray):
                raise TypeError(
                    f"the column {name!r} of a batch is a {type(column).__name__}; use tensors, arrays, lists, or "
                    "dicts and tuples of these"
                )
            if not _has_rows(column, num_rows):
                raise _other_length(name, column.shape[0] if column.ndim else "no", num_rows)
            return column
        is_tuple = isinstance(column, tuple) and not is_of_texts(column)
        is_of_rows = len(column) == num_rows and not is_tuple
        if (not is_of_rows or name in self._of_columns) and all(_has_rows(part, num_rows) for part in column):
            self._of_columns.add(name)
            parts = (self._read(f"{name}[{place}]", part, num_rows) for place, part in enumerate(column))
            return tuple_like(column, parts)
        if not is_of_rows:
            raise _other_length(name, len(column), num_rows)
        return list(column)


def tuple_like(given: Any, parts: Any) -> tuple[Any, ...]:
    """A tuple of these parts; of the same type as a named one that is given."""
    made: tuple[Any, ...] = type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)
    return made


def is_of_texts(column: Sequence[Any]) -> bool:
    """Whether a tuple is a column, as torch collates the texts of tuples, and no tuple of columns."""
    return bool(column) and isinstance(column[0], str | bytes)


def _has_rows(column: Any, num_rows: int) -> bool:
    if isinstance(column, torch.Tensor | np.ndarray):
        return column.ndim > 0 and len(column) == num_rows
    if isinstance(column, Mapping):
        return all(_has_rows(part, num_rows) for part in column.values())
    return _is_sequence(column) and (
        len(column) == num_rows or (len(column) > 0 and all(_has_rows(part, num_rows) for part in column))
    )


def _is_sequence(column: Any) -> bool:
    return isinstance(column, Sequence) and not isinstance(column, str | bytes)


def _other_length(name: str, length: int | str, num_rows: int) -> ValueError:
    return ValueError(
        f"a batch of {num_rows} samples has a column {name!r} of {length} rows; each sample needs its own"
    )
