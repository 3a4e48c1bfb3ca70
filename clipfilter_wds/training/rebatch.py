"""Packs kept rows into batches of constant size."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from clipfilter_wds.training.collate import is_of_texts, tuple_like
from clipfilter_wds.training.recycler import Recycler

#: Shape and type -> a tensor.
NewTensor = Callable[..., torch.Tensor]


class _Piece(NamedTuple):
    columns: dict[str, Any]
    rows: np.ndarray


class Rebatcher:
    """Packs rows of pieces of any size into batches of one size, in order.

    A piece is a dict of columns: tensors, arrays, lists, or nested dicts and tuples of these, with one row per sample.

    Args:
        batch_size: Rows per batch.
        page_locked: Put tensors in page-locked memory, from which copies to a GPU are quick.
    """

    def __init__(self, batch_size: int, *, page_locked: bool = False) -> None:
        self._batch_size = batch_size
        self._new: NewTensor = _new_page_locked if page_locked else Recycler()
        self._may_share = not page_locked
        self._pieces: deque[_Piece] = deque()
        self._begun = 0  # rows of the first piece that were handed out
        self.num_rows = 0

    def push(self, columns: dict[str, Any], rows: np.ndarray) -> None:
        """Append these rows, int64 ``[M]``, of a piece."""
        self._pieces.append(_Piece(columns, rows))
        self.num_rows += len(rows)

    @property
    def is_ready(self) -> bool:
        """Whether a whole batch can be had."""
        return self.num_rows >= self._batch_size

    def pop(self) -> dict[str, Any]:
        """The next batch; it is smaller than the others when there are no more rows."""
        wanted = min(self._batch_size, self.num_rows)
        parts, missing = [], wanted
        while missing:
            columns, rows = self._pieces[0]
            stop = min(self._begun + missing, len(rows))
            parts.append(_Piece(columns, rows[self._begun : stop]))
            missing -= stop - self._begun
            self._begun = stop
            self._drop_used()
        self.num_rows -= wanted
        batch: dict[str, Any] = _gathered(
            [part.columns for part in parts], [part.rows for part in parts], self._new, may_share=self._may_share
        )
        return batch

    def _drop_used(self) -> None:
        while self._pieces and self._begun == len(self._pieces[0].rows):
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


def take(column: Any, rows: np.ndarray, new: NewTensor = torch.empty) -> Any:
    """Some of the rows of a column, or of every column of a nested structure, copied.

    Args:
        column: Tensor, array, list, or dict or tuple of these.
        rows: int64 ``[M]``.
        new: Shape and type -> a tensor to copy to.

    Raises:
        TypeError: When a column is neither tensor nor sequence.
    """
    return _gathered([column], [rows], new)


def _new_page_locked(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cpu", pin_memory=True)


def _gathered(columns: list[Any], rows: list[np.ndarray], new: NewTensor, *, may_share: bool = False) -> Any:
    """The rows of one column after another, as one column; its memory may be another's if ``may_share``."""
    first = columns[0]
    kinds = dict.fromkeys(_kind(column) for column, some in zip(columns, rows, strict=True) if len(some))
    if len(kinds) > 1:
        raise ValueError(
            f"some rows of a batch are {' and others '.join(kinds)}, which no column can hold; have the transform, or "
            "the collation of the loader, give all samples the same, padded or resized where need be"
        )
    if isinstance(first, torch.Tensor):
        return _gathered_tensors(columns, rows, new, may_share=may_share)
    if isinstance(first, Mapping):
        for column in columns:
            if column.keys() != first.keys():
                raise ValueError(
                    f"one batch has the columns {sorted(map(str, first))} and another {sorted(map(str, column))}; all "
                    "have to have the same"
                )
        gathered = {}
        for name in first:
            with _at_column(name):
                gathered[name] = _gathered([column[name] for column in columns], rows, new, may_share=may_share)
        return gathered
    if isinstance(first, np.ndarray):
        return np.concatenate([column[some] for column, some in zip(columns, rows, strict=True)])
    if isinstance(first, tuple) and not any(map(is_of_texts, columns)):
        parts = zip(*columns, strict=True)
        return tuple_like(first, (_gathered(list(part), rows, new, may_share=may_share) for part in parts))
    if isinstance(first, Sequence) and not isinstance(first, (str, bytes)):
        return [column[row] for column, some in zip(columns, rows, strict=True) for row in some.tolist()]
    kind = type(first).__name__
    raise TypeError(f"a column of a batch is a {kind}; use tensors, arrays, lists, or dicts and tuples of these")


def _kind(column: Any) -> str:
    """What has to be the same for columns to become one."""
    if isinstance(column, torch.Tensor | np.ndarray):
        return f"{type(column).__name__}s of the shape {tuple(column.shape[1:])}"
    if isinstance(column, Mapping):
        return "dicts"
    if isinstance(column, tuple) and not is_of_texts(column):
        return f"tuples of {len(column)}"
    return "items of a list"


@contextmanager
def _at_column(name: Any) -> Iterator[None]:
    """Name the column where an error is raised."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in the column {name!r}")
        raise


def _gathered_tensors(
    tensors: list[torch.Tensor], rows: list[np.ndarray], new: NewTensor, *, may_share: bool
) -> torch.Tensor:
    if may_share and len(tensors) == 1 and (run := _as_run(rows[0])):
        return tensors[0][run]
    shapes = {(tensor.shape[1:], tensor.dtype, tensor.device) for tensor in tensors}
    if len(shapes) > 1 or tensors[0].device.type != "cpu":  # of several types torch makes one
        indices = [torch.from_numpy(some).to(tensor.device) for tensor, some in zip(tensors, rows, strict=True)]
        return torch.cat([tensor[index] for tensor, index in zip(tensors, indices, strict=True)])
    gathered = new((sum(map(len, rows)), *tensors[0].shape[1:]), dtype=tensors[0].dtype)
    begin = 0
    for tensor, some in zip(tensors, rows, strict=True):
        _copy_rows(tensor, some, gathered[begin : begin + len(some)])
        begin += len(some)
    return gathered


def _copy_rows(tensor: torch.Tensor, rows: np.ndarray, out: torch.Tensor) -> None:
    """Copy rows, in this thread: ``index_select`` has others help, which spin beside what decodes and trains."""
    if not tensor.is_contiguous() or not out.numel():
        torch.index_select(tensor, 0, torch.from_numpy(rows), out=out)
        return
    source, target = (each.view(len(each), -1).view(torch.uint8).numpy() for each in (tensor, out))
    np.take(source, rows, axis=0, out=target, mode="clip")  # of which "raise" would make a copy


def _as_run(rows: np.ndarray) -> slice | None:
    """Consecutive rows as a slice; None when they are not, or none."""
    if not len(rows) or rows[-1] - rows[0] + 1 != len(rows) or (np.diff(rows) != 1).any():
        return None
    return slice(int(rows[0]), int(rows[-1]) + 1)
