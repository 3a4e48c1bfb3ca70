"""Packs kept rows into batches of constant size."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class Rebatcher:
    """Packs pieces of any size into batches of one size, in order.

    A piece is a dict of columns: tensors, lists, or nested dicts and tuples of these, with one row per sample.

    Args:
        batch_size: Rows per batch.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._pieces: deque[tuple[dict[str, Any], int]] = deque()
        self._begun = 0  # rows of the first piece that were handed out
        self.num_rows = 0

    def push(self, piece: dict[str, Any], num_rows: int) -> None:
        """Append a piece."""
        self._pieces.append((piece, num_rows))
        self.num_rows += num_rows

    def skip(self, num_rows: int) -> None:
        """Pass over the first rows of the only piece.

        Raises:
            ValueError: When it has fewer.
        """
        if len(self._pieces) != 1 or num_rows > self.num_rows:
            raise ValueError(f"{num_rows} rows can't be skipped: {self.num_rows} are there")
        self._begun += num_rows
        self.num_rows -= num_rows

    @property
    def is_ready(self) -> bool:
        """Whether a whole batch can be had."""
        return self.num_rows >= self._batch_size

    def pop(self) -> dict[str, Any]:
        """The next batch; it is smaller than the others when there are no more rows."""
        wanted = min(self._batch_size, self.num_rows)
        slices, missing = [], wanted
        while missing:
            piece, num_rows = self._pieces[0]
            stop = min(self._begun + missing, num_rows)
            slices.append(take(piece, range(self._begun, stop)))
            missing -= stop - self._begun
            self._begun = stop
            self._drop_used()
        self.num_rows -= wanted
        batch: dict[str, Any] = _join(slices)
        return batch

    def _drop_used(self) -> None:
        while self._pieces and self._begun == self._pieces[0][1]:
            self._pieces.popleft()
            self._begun = 0

    @property
    def num_pieces(self) -> int:
        """Pieces of which rows are left."""
        return len(self._pieces)

    @property
    def num_begun(self) -> int:
        """Rows of the first of them that were handed out."""
        return self._begun


def take(rows: Any, indices: Sequence[int]) -> Any:
    """Some of the rows of a column, or of every column of a nested structure.

    Raises:
        TypeError: When a column is neither tensor nor sequence.
    """
    if isinstance(rows, torch.Tensor):
        return rows[indices.start : indices.stop] if isinstance(indices, range) else rows[list(indices)]
    if isinstance(rows, Mapping):
        return {name: take(column, indices) for name, column in rows.items()}
    if isinstance(rows, tuple):
        return tuple(take(column, indices) for column in rows)
    if isinstance(rows, Sequence) and not isinstance(rows, (str, bytes)):
        return [rows[index] for index in indices]
    raise TypeError(f"a column of a batch is a {type(rows).__name__}; use tensors, lists, or dicts and tuples of these")


def _join(pieces: list[Any]) -> Any:
    first = pieces[0]
    if len(pieces) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(pieces)
    if isinstance(first, Mapping):
        return {name: _join([piece[name] for piece in pieces]) for name in first}
    if isinstance(first, tuple):
        return tuple(_join(list(columns)) for columns in zip(*pieces, strict=True))
    return [row for piece in pieces for row in piece]
