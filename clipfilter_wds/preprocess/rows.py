"""Keeps what is known of samples beside their pixels, a column per field."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import numpy as np

from clipfilter_wds.types import NO_REASON, REASON_CODES, DropReason, SampleRow

_REASONS = tuple(DropReason)

#: The fields of ``SampleRow`` that are numbers; ``reason`` is one of ``REASON_CODES``, or ``NO_REASON``.
_NUMBERS = np.dtype(
    [
        ("index", np.int32),
        ("reason", np.int8),
        ("num_tokens", np.int32),
        ("truncated", np.bool_),
        ("width", np.int32),
        ("height", np.int32),
    ]
)


@dataclass(frozen=True, eq=False)
class SampleRows:
    """Rows of samples, so that no process behind the one that read them looks at them one by one.

    Attributes:
        keys: Per row, the sample's key.
        uids: Per row, the sample's uid, None where it has none.
        numbers: The other fields of ``SampleRow``, as one structured array ``[N]``.
    """

    keys: list[str]
    uids: list[bytes | None]
    numbers: np.ndarray

    @classmethod
    def of(cls, rows: Iterable[SampleRow]) -> Self:
        """From rows one by one."""
        rows = list(rows)
        numbers = [
            (row.index, code_of(row.reason), row.num_tokens, row.truncated, row.width, row.height) for row in rows
        ]
        return cls.of_columns([row.key for row in rows], [row.uid for row in rows], numbers)

    @classmethod
    def of_columns(cls, keys: list[str], uids: list[bytes | None], numbers: Sequence[tuple[int, ...]]) -> Self:
        """From keys, uids, and index, code of the reason, number of tokens, whether truncated, width and height."""
        return cls(keys, uids, np.array(numbers, dtype=_NUMBERS))

    @classmethod
    def concat(cls, batches: Sequence["SampleRows"]) -> Self:
        """All rows of several, in order."""
        numbers = np.concatenate([np.empty(0, dtype=_NUMBERS), *(batch.numbers for batch in batches)])
        keys = list(chain.from_iterable(batch.keys for batch in batches))
        return cls(keys, list(chain.from_iterable(batch.uids for batch in batches)), numbers)

    def take(self, places: np.ndarray) -> Self:
        """The rows at these places, int64 ``[M]``."""
        numbers = places.tolist()
        keys, uids = [self.keys[place] for place in numbers], [self.uids[place] for place in numbers]
        return type(self)(keys, uids, self.numbers[places])

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[SampleRow]:
        for key, uid, numbers in zip(self.keys, self.uids, self.numbers.tolist(), strict=True):
            index, code, num_tokens, truncated, width, height = numbers
            reason = None if code == NO_REASON else _REASONS[code]
            yield SampleRow(key, index, reason, num_tokens, truncated, width, height, uid)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SampleRows) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def reasons(self) -> np.ndarray:
        """Per row, why the sample can't be scored: int8 ``[N]`` of ``REASON_CODES``, or ``NO_REASON``."""
        reasons: np.ndarray = self.numbers["reason"]
        return reasons

    @property
    def usable(self) -> np.ndarray:
        """Per row, whether the sample can be scored: bool ``[N]``."""
        usable: np.ndarray = self.reasons == NO_REASON
        return usable

    @property
    def num_truncated(self) -> int:
        """How many captions were longer than the text tower takes."""
        return int(self.numbers["truncated"].sum())


def code_of(reason: DropReason | None) -> int:
    """What stands for a reason, or for none, among the codes."""
    return NO_REASON if reason is None else REASON_CODES[reason]


def reasons_of(codes: np.ndarray) -> list[DropReason | None]:
    """The reasons that codes, int8 ``[N]``, stand for."""
    return [None if code == NO_REASON else _REASONS[code] for code in codes.tolist()]


def count_reasons(codes: np.ndarray) -> dict[DropReason, int]:
    """How often each reason occurs among codes, int8 ``[N]``; those that don't are left out."""
    counts = np.bincount(codes[codes != NO_REASON], minlength=len(_REASONS))
    return {reason: int(count) for reason, count in zip(_REASONS, counts, strict=True) if count}
